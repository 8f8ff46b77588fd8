"""Main indexes: what the live index puts its fresh buffer, its mask and its rescoring around."""
