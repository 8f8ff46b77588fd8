"""One query worker: its start, its replica of the item vectors, its snapshots, its processes."""
