"""ANN libraries behind the live index."""
