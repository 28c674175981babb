"""Quantizing with another tool, in an environment of its own; `tools.quantizing.external` is the way in.

`worker.py` runs in that environment, and nothing here imports it.
"""
