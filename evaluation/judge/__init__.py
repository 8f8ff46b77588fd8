"""The judge: what the recall paths and the fused answer are worth on the live topics."""
