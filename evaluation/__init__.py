"""Offline evaluation: a log is replayed through the functions that ingest and serve."""
