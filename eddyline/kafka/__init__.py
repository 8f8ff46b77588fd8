"""Kafka for everything but the Faust agents: topics, clients, producers, reading, security."""
