"""The trainer process; no other process imports torch."""
