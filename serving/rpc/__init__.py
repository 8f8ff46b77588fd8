"""The gRPC edge: server, services, converters, client."""
