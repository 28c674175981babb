"""A card's memory and streams, without a card: what PyTorch says of them is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from amalgam.kernels.backends import choose_backend, why_no_triton
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.devices import free_bytes, uploading

CARD = torch.device("cuda", 7)


def test_what_pytorch_holds_for_nobody_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a version that has gone: PyTorch keeps their memory, and the driver does not know that it may."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert free_bytes(CARD) == 25


def test_all_uploads_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stream] = []
    current: list[Stream] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.has_arrived = False
            made.append(self)

        def synchronize(self) -> None:
            self.has_arrived = True

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    for _ in range(40):
        with uploading(CARD):
            pass
    assert len(made) == 1 and current == made * 40 and made[0].has_arrived


def test_without_what_triton_builds_with_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    launching = pytest.importorskip("amalgam.kernels.backends.triton.launching")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launching, "why_no_launch", lambda: "no compiler")
    assert why_no_triton(CARD) == "no compiler"
    assert isinstance(choose_backend(torch.bfloat16, CARD), ReferenceBackend)
    monkeypatch.setattr(launching, "why_no_launch", lambda: None)
    assert why_no_triton(CARD) is None
