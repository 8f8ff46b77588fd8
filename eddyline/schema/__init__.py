"""Events and records: fields, validation, deduplication, user histories, partitions."""
