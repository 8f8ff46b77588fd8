"""Training data: its sources, and the examples made from it."""
