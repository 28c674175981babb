"""The ids of the KV cache's blocks, and which of them are free.

In: how many blocks are needed. Out: block ids. Must never know: tensors, tokens, requests.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block ids `0 … num_blocks - 1`."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free_ids = list(range(num_blocks - 1, -1, -1))  # a stack: the block used last is the warmest
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free_ids)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        block_ids = [self._free_ids.pop() for _ in range(count)]
        for block_id in block_ids:
            self._is_free[block_id] = False
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Take blocks back."""
        for block_id in block_ids:
            assert not self._is_free[block_id], f"block {block_id} is freed twice"
            self._is_free[block_id] = True
            self._free_ids.append(block_id)
