"""Files → tensors: checkpoint folders, their shards, and writing new ones. Knows nothing of precision or layers."""

from amalgam.checkpoint.hub import resolve
from amalgam.checkpoint.store import TensorEntry, TensorStore
from amalgam.checkpoint.writer import write_checkpoint

__all__ = ["TensorEntry", "TensorStore", "resolve", "write_checkpoint"]
