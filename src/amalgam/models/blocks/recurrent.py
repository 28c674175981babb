"""What blocks have in common that keep a recurrent state in place of keys and values.

In: nothing. Out: the base of such blocks. Must never know: which recurrence it is.
"""

from __future__ import annotations


class RecurrentBlock:
    """Has no keys and values in the cache, and its order comes from the recurrence; see `AttentionBlock`."""

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return 0, 0, 0

    @property
    def rope(self) -> None:
        return None
