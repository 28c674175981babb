"""The ids of the KV cache's blocks: which are free, who shares them, and what the full ones hold.

In: how many blocks are needed; the keys of blocks that have been computed. Out: block ids. Must never know: tensors,
requests.

A block that nobody refers to is free, and keeps what it holds until it is handed out again: those without a key go
first, then those that have been free for longest. Whoever frees the last block of a sequence first keeps its beginning
for longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from hashlib import blake2b

Key = bytes

_KEY_BYTES = 32


class BlockPool:
    """Hands out block ids `0 … num_blocks - 1`, and finds those that hold what is needed already.

    Attributes:
        num_untouched: blocks that nobody has had yet.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = self.num_untouched = num_blocks
        self._blank_ids = list(range(num_blocks - 1, -1, -1))  # free; a stack: the block used last is the warmest
        self._kept_ids: OrderedDict[int, None] = OrderedDict()  # free, with a key; the longest free comes first
        self._num_users = [0] * num_blocks
        self._names: list[tuple[int, Key] | None] = [None] * num_blocks  # version id and key of a full block
        self._by_version: dict[int, dict[Key, int]] = {}  # version id → key → block id

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to, whatever they hold."""
        return len(self._blank_ids) + len(self._kept_ids)

    @property
    def version_ids(self) -> AbstractSet[int]:
        """The weight versions whose keys and values some block holds."""
        return self._by_version.keys()

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, whose contents are forgotten; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        block_ids = []
        for _ in range(count):
            if self._blank_ids:
                block_id = self._blank_ids.pop()
            else:
                block_id, _ = self._kept_ids.popitem(last=False)
                self._forget(block_id)
            self._num_users[block_id] = 1
            block_ids.append(block_id)
        self.num_untouched = min(self.num_untouched, len(self._blank_ids))  # they lie below those that have come back
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Somebody refers to these blocks no more."""
        for block_id in block_ids:
            assert self._num_users[block_id], f"block {block_id} is freed twice"
            self._num_users[block_id] -= 1
            if self._num_users[block_id]:
                continue
            if self._names[block_id] is None:
                self._blank_ids.append(block_id)
            else:
                self._kept_ids[block_id] = None

    def find(self, version_id: int, keys: Sequence[Key]) -> list[int]:
        """The blocks that hold the first of `keys`, as many as there are without a gap."""
        known = self._by_version.get(version_id)
        block_ids: list[int] = []
        if known:
            for key in keys:
                if (block_id := known.get(key)) is None:
                    break
                block_ids.append(block_id)
        return block_ids

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of these nobody refers to."""
        return sum(not self._num_users[block_id] for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """One more refers to blocks that `find` has found."""
        for block_id in block_ids:
            if not self._num_users[block_id]:
                del self._kept_ids[block_id]
            self._num_users[block_id] += 1

    def publish(self, version_id: int, key: Key, block_id: int) -> None:
        """A block is full and will not be written to again: others may find it. Of several with one key, the first."""
        assert self._num_users[block_id], f"block {block_id} is free"
        known = self._by_version.setdefault(version_id, {})
        if key not in known and self._names[block_id] is None:
            known[key] = block_id
            self._names[block_id] = version_id, key

    def forget(self, block_ids: Iterable[int]) -> None:
        """From now on nobody finds these blocks, which are in use."""
        for block_id in block_ids:
            if self._names[block_id] is not None:
                self._forget(block_id)

    def forget_version(self, version_id: int) -> None:
        """What blocks hold of a weight version is of no use any more."""
        for block_id in list(self._by_version.get(version_id, {}).values()):
            self._forget(block_id)
            if not self._num_users[block_id]:
                del self._kept_ids[block_id]
                self._blank_ids.append(block_id)

    def _forget(self, block_id: int) -> None:
        name = self._names[block_id]
        assert name is not None
        version_id, key = name
        self._names[block_id] = None
        del self._by_version[version_id][key]
        if not self._by_version[version_id]:
            del self._by_version[version_id]


def extend_keys(keys: list[Key], token_ids: Sequence[int], block_size: int, num_keys: int) -> None:
    """Make `keys` those of the first `num_keys` blocks of a sequence, in place.

    A block's key is a BLAKE2b hash (RFC 7693) of the key before it and its own tokens, so that it stands for all tokens
    up to its end. 256 bits: nobody finds two prompts with one key.
    """
    for index in range(len(keys), num_keys):
        parent = keys[-1] if keys else b""
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size])
        keys.append(blake2b(parent + tokens.tobytes(), digest_size=_KEY_BYTES).digest())
