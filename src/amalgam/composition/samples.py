"""Which rows and columns of a wide weight are compared: chosen by a hash of its name, so that no stride hides a change.

In: a source, a weight, its slot. Out: values. Must never know: what they are compared with.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from amalgam.composition.source import Source
from amalgam.formats.contract import StoredWeight
from amalgam.models.spec import Slot

# Runs of rows, which most formats have apart, and about so many values.
_RUN, _NUM_VALUES = 8, 2**16
_LEAST_RUNS = {"embedding": 8, "head": 8, "attention": 4, "linear_attention": 4}
_MAX_COLUMNS = 1024  # of a router, whose rows are all compared


def name_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _runs(slot: Slot) -> list[range]:
    """Runs of a matrix's rows, by a hash of its name: what is moved at a stride is seen too."""
    num_rows, num_columns = slot.shape[0], math.prod(slot.shape[1:])
    count = max(_NUM_VALUES // num_columns // _RUN, _LEAST_RUNS.get(slot.role, 2))
    starts = range(0, num_rows, _RUN)
    if slot.role != "router" and count < len(starts):
        generator = torch.Generator().manual_seed(int.from_bytes(name_hash(slot.name)[:7]))
        found = torch.randperm(len(starts), generator=generator)[:count].sort().values.tolist()
        return [range(starts[index], min(starts[index] + _RUN, num_rows)) for index in found]
    return [range(num_rows)]


def sample(source: Source, stored: StoredWeight, slot: Slot) -> Tensor:
    """Some rows of a weight, float32; of a router all rows, but not all columns."""
    if slot.is_transposed and stored.is_wide:
        whole = source.values(stored.name)
        assert whole is not None
        return torch.cat([whole.t()[run.start : run.stop] for run in _runs(slot)])
    values = source.rows(stored, _runs(slot))
    if slot.role == "router" and values.shape[1] > _MAX_COLUMNS:
        generator = torch.Generator().manual_seed(int.from_bytes(name_hash(slot.name)[:7]))
        start = int(torch.randint(values.shape[1] - _MAX_COLUMNS, (), generator=generator))
        values = values[:, start : start + _MAX_COLUMNS]
    return values
