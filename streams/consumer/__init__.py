"""Reading from Kafka beside the Faust agents: the service, its thread, and the buffers."""
