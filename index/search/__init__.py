"""How one index version is searched."""
