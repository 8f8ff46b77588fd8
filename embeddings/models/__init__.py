"""Models that are trained; torch is imported from here on."""
