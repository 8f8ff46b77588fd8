"""Rules of the answer after fusion: limits, diversity, editorial rules, pages."""
