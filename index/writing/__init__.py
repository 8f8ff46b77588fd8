"""How a batch becomes the next index version."""
