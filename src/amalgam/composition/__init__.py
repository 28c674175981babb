"""Many checkpoints → one weight version: sources, rules, planned weights, agreement, loading.

Must never know: requests.
"""
