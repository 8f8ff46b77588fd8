"""The query worker: gRPC answers from its own replica of the index."""
