"""Arithmetic on packed weights. Knows nothing of names or plans."""
