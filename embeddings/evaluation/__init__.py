"""Offline evaluation of a generation."""
