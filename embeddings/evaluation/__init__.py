"""How good a generation is."""
