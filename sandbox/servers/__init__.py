"""Real Apache Kafka and Valkey on this machine, without Docker and root, kept alive by one supervisor."""
