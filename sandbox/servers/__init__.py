"""Apache Kafka and Valkey on this machine, without Docker and root, under one supervisor."""
