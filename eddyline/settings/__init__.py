"""Every setting, by section."""
