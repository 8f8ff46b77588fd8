"""Embedding models: how items and users become vectors. Numpy only per event and per query."""
