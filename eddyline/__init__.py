"""The kernel: events, settings, errors, ports and stores. It knows no framework."""

__version__ = "0.1.0"
