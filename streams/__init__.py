"""Kafka in, state out: the Faust agents and the plain functions that they call."""
