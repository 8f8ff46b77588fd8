"""Vectors of items to nearest items: one port, an exact oracle and the live index."""
