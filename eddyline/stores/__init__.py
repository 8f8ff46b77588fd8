"""Adapters of `state_store.StateStore`, one file each, and their parts."""
