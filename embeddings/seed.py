"""The bounds of a training's seed."""

# Drawing accepts no negative number; larger ones add nothing.
SEED_MAX = 2**32 - 1
