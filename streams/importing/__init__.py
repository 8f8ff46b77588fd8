"""Import of files: rows become events, and events go to Kafka, each exactly once."""
