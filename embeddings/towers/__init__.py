"""Models at run time: towers, micro-step and the registry of kinds, in numpy only."""
