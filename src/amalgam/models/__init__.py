"""Packed weights → logits. Knows nothing of requests."""
