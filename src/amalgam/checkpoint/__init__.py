"""Files → tensors: checkpoint folders, their shards, and writing new ones. Knows nothing of precision or layers."""

from amalgam.checkpoint.source import member, read_json, resolve
from amalgam.checkpoint.store import TensorEntry, TensorStore
from amalgam.checkpoint.writer import write_checkpoint

__all__ = ["TensorEntry", "TensorStore", "member", "read_json", "resolve", "write_checkpoint"]
