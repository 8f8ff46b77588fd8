"""The data of one index version."""
