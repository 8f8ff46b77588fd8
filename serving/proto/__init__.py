"""The wire format of the query worker: `retrieval.proto`, `shard.proto` and the code generated from them."""
