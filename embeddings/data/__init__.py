"""Training data: where events come from, and the examples made of them."""
