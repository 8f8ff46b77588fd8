"""Real servers, processes and data sets on one machine, for the demo, benchmarks and tests."""
