"""Snapshots of the live index."""
