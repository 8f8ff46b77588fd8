"""From a batch of records, or a rebuild, to the next index version."""
