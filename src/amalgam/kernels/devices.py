"""Devices as PyTorch knows them, by the names that settings have.

In: a name of `amalgam.config.devices`. Out: a `torch.device`, its free memory. Must never know: what lies there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from amalgam.base.machine import detect_machine
from amalgam.config.devices import device_name


def torch_device(name: str) -> torch.device:
    """Where tensors of a device lie; those of a stand-in for a card are in the processors' memory."""
    kind, _, number = name.partition(":")
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(number or 0))


def name_of(device: torch.device) -> str:
    """What settings call it."""
    return device_name(str(device))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return detect_machine().available_bytes


@contextmanager
def uploading(device: torch.device) -> Iterator[None]:
    """Within it the calling thread's copies to a card go beside what runs there; behind it they have arrived."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
