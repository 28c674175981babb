"""The compiled CPU kernels: weights in panels, and a whole step in one call."""
