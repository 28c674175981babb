"""The checks: a file for each category, found by `registry.py`."""
