"""What every process needs: start, retry, stop, heartbeat, files, logs, metrics."""
