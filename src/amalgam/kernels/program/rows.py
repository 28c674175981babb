"""Where instructions find and leave activations."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rows:
    """Where an instruction finds or leaves activations, `[tokens, width]`: columns of a buffer.

    Attributes:
        buffer: buffers of one name are one piece of memory, so that each layer uses what the one before has left.
        stride: elements from one token's row to the next.
        start, width: the columns.
        is_wide: float32, whatever the activations are.
    """

    buffer: str
    stride: int
    start: int
    width: int
    is_wide: bool = False

    def columns(self, start: int, width: int) -> Rows:
        """Some of these columns."""
        assert 0 <= start <= start + width <= self.width, (self, start, width)
        return replace(self, start=self.start + start, width=width)

    @property
    def is_whole(self) -> bool:
        """Whether the rows lie one behind the other without a gap."""
        return self.width == self.stride
