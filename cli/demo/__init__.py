"""The demo: a world to show, and the steps that show a click change an answer."""
