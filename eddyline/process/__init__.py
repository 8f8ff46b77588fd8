"""What every process needs: lifecycle, retry, locks, files, heartbeat, logs, metrics."""
