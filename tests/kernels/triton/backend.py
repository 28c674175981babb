"""The Triton backend where Triton interprets, and what stands in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amalgam.kernels.backends.triton.backend import TritonBackend
from amalgam.kernels.backends.triton.graphs import Outputs
from amalgam.models.registry import all_families, read_spec
from tests.models.tiny import BASE_CONFIG, write_checkpoint

CPU = torch.device("cpu")


@contextmanager
def loading() -> Iterator[None]:
    """Within it models are loaded for Triton's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amalgam.composition.devices.choose_backend", TritonBackend)
        yield


def save_random(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> None:
    """A checkpoint of a tiny model of one layer; transformers, which takes long to import, has no part in it."""
    family = next(family for family in all_families() if family.name == name)
    config = {**BASE_CONFIG, "model_type": name, "architectures": [family.architectures[0]], **family.tiny_config}
    config |= {**changes, "num_hidden_layers": 1}
    generator, tensors = torch.Generator().manual_seed(6), {}
    for slot in read_spec(config, name)[1].slots:
        values = 0.1 * torch.randn(slot.shape, generator=generator)
        tensors[family.logical_name(slot)] = (values + 1 if slot.role == "norm" else values).to(dtype)
    write_checkpoint(folder, config, tensors)


class NothingAsked(TorchDispatchMode):
    """Raises where the host wants to know what a tensor holds, or shapes depend on it: a capture would fail there."""

    _ASKING = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in self._ASKING, func.name()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Again:
    """Runs the work again, and leaves what it makes where the first run has left it."""

    work: Callable[[], Outputs]
    outputs: Outputs

    def replay(self) -> None:
        new = self.work()
        self.outputs.logits.copy_(new.logits)
        self.outputs.hidden.copy_(new.hidden)
        for (_, *kept), (_, *made) in zip(self.outputs.routing, new.routing, strict=True):
            for one, other in zip(kept, made, strict=True):
                one.copy_(other)


class Repeater:
    """See `graphs.Recorder`; refuses work that asks the host."""

    def __init__(self) -> None:
        self.recordings: list[Again] = []

    def record(self, work: Callable[[], Outputs], device: torch.device) -> Again:
        with NothingAsked():
            outputs = work()
        self.recordings.append(Again(work, outputs))
        return self.recordings[-1]
