"""Saved sets: the statistics of some traffic as one file, to compare, to merge, or to go on from."""
