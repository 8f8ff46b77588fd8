"""The command line: `eddyline <verb>`. Nothing imports it."""
