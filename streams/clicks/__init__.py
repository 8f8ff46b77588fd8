"""Clicks in: histories, embeddings, popularity."""
