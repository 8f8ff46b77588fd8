"""The wire format of the query worker: `retrieval.proto` and the code generated from it."""
