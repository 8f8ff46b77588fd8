"""The bundle: a generation on disk."""
