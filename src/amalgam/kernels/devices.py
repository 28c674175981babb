"""Devices as PyTorch knows them, by the names that settings have.

In: a name of `amalgam.config.devices`. Out: a `torch.device`, its free memory. Must never know: what lies there.
"""

from __future__ import annotations

import functools
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
        # What PyTorch holds for tensors to come, which those of a version that has gone were in, is free as well.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return detect_machine().available_bytes


@contextmanager
def uploading(device: torch.device) -> Iterator[None]:
    """Within it the calling thread's copies to a card go beside what runs there; behind it they have arrived."""
    if device.type != "cuda":
        yield
        return
    stream = _upload_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all threads and weights: memory that is freed serves the stream again that it was taken in, and of the
    32 streams that PyTorch hands out in turns none may be one in which a step is recorded."""
    return torch.cuda.Stream(device)
