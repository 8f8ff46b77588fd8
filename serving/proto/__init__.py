"""The wire format of the query worker: `*.proto` and the code that `make proto` generates."""
