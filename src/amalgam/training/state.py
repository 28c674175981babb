"""Training that outlives a kill: all that it goes on from, in one file.

In: parameters, what the optimizer remembers of them, the curve. Out: that file, which appears whole or not at all, and
all of it again. Must never know: what is trained, and how.

    training.safetensors   parameters/NAME, best/NAME, first/NAME, second/NAME   float32, of each parameter
                           notes                                                 uint8: JSON in UTF-8
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from amalgam.base.files import writing
from amalgam.checkpoint.writer import write_shard
from amalgam.errors import CheckpointError, ConflictError, describe

FILE = "training.safetensors"
_NOTES = "notes"
_KINDS = ("parameters", "best", "first", "second")


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where training is.

    Attributes:
        parameters: as they are now, by name.
        best: as they were when the student did best; those of the beginning at first.
        first, second: means of gradients and of their squares, as Adam keeps them (Kingma & Ba 2015).
        notes: JSON values: the step, the curve.
    """

    parameters: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    notes: Mapping[str, Any]


def is_begun(folder: Path) -> bool:
    """Whether there is anything to go on from."""
    return (folder / FILE).is_file()


def save_state(folder: Path, identity: Mapping[str, Any], state: TrainingState) -> None:
    """
    Args:
        identity: what the run depends on, JSON values.

    Raises:
        CheckpointError: there is no room; what was there stays.
    """
    notes = json.dumps({"identity": identity, **state.notes}).encode()
    tensors = {f"{kind}/{name}": tensor.detach() for kind in _KINDS for name, tensor in getattr(state, kind).items()}
    tensors[_NOTES] = torch.frombuffer(bytearray(notes), dtype=torch.uint8)
    with writing(folder):
        write_shard(folder / FILE, tensors)


def load_state(folder: Path, identity: Mapping[str, Any]) -> TrainingState:
    """
    Raises:
        CheckpointError: the file is damaged.
        ConflictError: it is of another run.
    """
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
    try:
        with safe_open(folder / FILE, "pt") as file:
            notes = json.loads(bytes(file.get_tensor(_NOTES).tolist()))
            for name in file.keys():  # noqa: SIM118
                kind, _, rest = name.partition("/")
                if kind in found:
                    found[kind][rest] = file.get_tensor(name)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{folder / FILE} is damaged ({error}).", remedy=f"Remove {folder} to begin anew."
        ) from None
    old = notes.pop("identity")
    if old != identity:
        differing, before, now = _difference(old, identity)
        raise ConflictError(
            f"{folder} holds a run that was begun with {differing} = {describe(before)}, and now it is "
            f"{describe(now)}.",
            remedy=f"Give the same options to go on, or remove {folder} to begin anew.",
        )
    return TrainingState(**found, notes=notes)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first key that differs, dotted where it is within another one, and both of its values."""
    key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
    before, now = old.get(key), new.get(key)
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return key, before, now
    inner, before, now = _difference(before, now)
    return f"{key}.{inner}", before, now
