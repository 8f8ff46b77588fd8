"""From a query to an answer: read the user, recall, fuse."""
