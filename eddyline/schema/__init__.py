"""Events and records: their fields, their validation, and what a user history is made of."""
