"""Tensors → packed weights, and the plan of which source each weight comes from. Knows nothing of layers."""
