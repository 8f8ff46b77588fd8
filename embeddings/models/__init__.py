"""Models that can be trained; the implementations import torch."""
