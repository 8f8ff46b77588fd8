"""What one index version holds."""
