"""The towers at run time, in numpy alone."""
