"""Data sets that the demo, benchmarks and tests run on."""
