"""Searching one index version."""
