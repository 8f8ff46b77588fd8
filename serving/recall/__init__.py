"""Paths: each names candidates for one user in its own way."""
