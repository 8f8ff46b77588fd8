"""Adapters of `ports.StateStore`, one file each."""
