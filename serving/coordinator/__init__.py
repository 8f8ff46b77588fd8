"""The coordinator: answers of all shards, as one worker with all items would give them."""
