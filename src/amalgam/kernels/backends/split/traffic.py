"""What went to a device and came back, counted. Must never know: what it was for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Traffic:
    """Of one device, since the start.

    Attributes:
        sent_bytes: of activations and expert ids, to it.
        returned_bytes: of experts' outputs, from it.
        num_calls: how often it was given something: at most once for each layer of a step.
        num_rows: (token, expert) pairs that it has multiplied.
    """

    sent_bytes: int = 0
    returned_bytes: int = 0
    num_calls: int = 0
    num_rows: int = 0

    def send(self, *tensors: Tensor) -> None:
        self.sent_bytes += sum(tensor.nbytes for tensor in tensors)
        self.num_calls += 1

    def receive(self, outputs: Tensor) -> None:
        """
        Args:
            outputs: `[pairs, hidden]`.
        """
        self.returned_bytes += outputs.nbytes
        self.num_rows += len(outputs)
