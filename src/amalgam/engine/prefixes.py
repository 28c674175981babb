"""Which requests begin alike: the blocks that they share, and those that one of them is about to compute.

In: requests as they are admitted, computed and released. Out: block ids. Must never know: steps, queues, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.engine.blocks import BlockPool, Key, extend_keys
from amalgam.engine.request import Request


class Prefixes:
    """Keys of requests' full blocks, in the pool and on their way there. Not thread-safe.

    Args:
        is_shared: False: nobody finds anything.
        has_states: a request can only go on where a recurrent state is kept, so that only the blocks that end there are
            waited for.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, is_shared: bool, has_states: bool = False) -> None:
        self._pool = pool
        self._has_states = has_states
        self._block_size = block_size
        self._is_shared = is_shared
        self._announced: dict[tuple[int, Key], Request] = {}  # version id, key → who is about to compute that block

    def may_find(self, request: Request) -> bool:
        return self._is_shared and request.may_skip_shared

    def find(self, request: Request, version_id: int) -> list[int]:
        """The blocks of a waiting request's beginning that are there, never that of its last token."""
        if not self.may_find(request):
            return []
        num_blocks = (len(request.token_ids) - 1) // self._block_size
        extend_keys(request.block_keys, request.token_ids, self._block_size, num_blocks)
        return self._pool.find(version_id, request.block_keys[:num_blocks])

    def count_coming(self, request: Request, version_id: int, index: int, shares: Mapping[int, int]) -> int:
        """How many blocks, from `index` on, of a waiting request's beginning others are about to compute; none if the
        first of them does not come nearer in this step.

        Args:
            index: how many `find` has found.
            shares: request id → how many tokens the step computes of it.
        """
        if not self.may_find(request):
            return 0
        keys = request.block_keys[index : (len(request.token_ids) - 1) // self._block_size]
        owners = [self._announced.get((version_id, key)) for key in keys]
        if self._has_states:
            is_near = [owner is not None and bool(shares.get(owner.request_id)) for owner in owners]
            return max((count for count, near in enumerate(is_near, 1) if near), default=0)
        if not owners or owners[0] is None or not shares.get(owners[0].request_id):
            return 0
        return [*owners, None].index(None)

    def announce(self, request: Request) -> None:
        """A request that has just got its blocks is about to compute those that are not there."""
        if not self._is_shared:
            return
        assert request.version is not None
        extend_keys(request.block_keys, request.token_ids, self._block_size, len(request.token_ids) // self._block_size)
        keys = request.block_keys[request.num_published :]
        if request.state is not None:
            keys = [request.block_keys[border // self._block_size - 1] for border in request.state.borders]
        for key in keys:
            self._announced.setdefault((request.version.version_id, key), request)

    def publish(self, request: Request) -> None:
        """Let others find the blocks that a commit has filled."""
        num_full = request.num_computed // self._block_size
        if num_full <= request.num_published or not self._is_shared:
            return
        assert request.version is not None
        extend_keys(request.block_keys, request.token_ids, self._block_size, num_full)
        for index in range(request.num_published, num_full):
            self._pool.publish(request.version.version_id, request.block_keys[index], request.block_ids[index])
            self._withdraw(request, request.version.version_id, request.block_keys[index])
        request.num_published = num_full

    def release(self, request: Request, *, is_sound: bool = True) -> None:
        """A request gives its blocks back, its beginning last: that is kept for longest.

        Args:
            is_sound: False: what the blocks hold may be wrong, and nobody is to find it.
        """
        if not is_sound:
            self._pool.forget(request.block_ids)
        if request.version is not None:
            for key in request.block_keys[request.num_published :]:
                self._withdraw(request, request.version.version_id, key)
        self._pool.free(reversed(request.block_ids))
        request.block_ids = []
        request.num_published = 0

    def _withdraw(self, request: Request, version_id: int, key: Key) -> None:
        if self._announced.get((version_id, key)) is request:
            del self._announced[version_id, key]
