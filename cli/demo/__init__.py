"""The demo: a running system, and the steps that show how a click changes an answer."""
