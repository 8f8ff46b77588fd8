"""The archive process: accepted events of clicks, items and users into Parquet files, exactly once."""
