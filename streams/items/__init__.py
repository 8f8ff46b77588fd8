"""Item changes in: metadata to Redis, vectors to Kafka."""
