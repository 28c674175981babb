"""Requests → tokens. Knows nothing of HTTP."""
