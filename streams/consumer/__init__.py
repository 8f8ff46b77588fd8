"""Kafka batches under Faust: the consumer, its thread, batching and fetch control."""
