"""The ids of the KV cache's blocks: which are free, and how many sequences hold each of the others.

In: how many blocks are needed. Out: block ids. Must never know: tensors, tokens, requests.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block ids `0 … num_blocks - 1`. A block is free again when the last of its holders frees it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free_ids = list(range(num_blocks - 1, -1, -1))  # a stack: the block used last is the warmest
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free_ids)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        block_ids = [self._free_ids.pop() for _ in range(count)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a holder to blocks that have one already."""
        for block_id in block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} is free and cannot be shared"
            self._num_holders[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Take one holder from each block."""
        for block_id in block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} is freed twice"
            self._num_holders[block_id] -= 1
            if not self._num_holders[block_id]:
                self._free_ids.append(block_id)
