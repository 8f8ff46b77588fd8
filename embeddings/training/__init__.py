"""Training of the towers. The only place that knows torch; nobody but the trainer imports it."""
