"""The archive process: writes accepted events into Parquet files, exactly once."""
