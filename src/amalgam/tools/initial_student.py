"""A student that is yet to be made: a folder with what it begins with, as a checkpoint like any other.

In: the teacher's plan, a config.json or how much smaller the student is to be. Out: the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.base.files import resumable_folder
from amalgam.base.folders import read_json
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.carry import carry_files, write_json
from amalgam.composition.opening import CONFIG_NAME
from amalgam.errors import ConfigError
from amalgam.models.registry import read_spec
from amalgam.tools.export.contract import PlannedModel
from amalgam.training.initial import STARTS, Shape, Start, initial_weights, smaller_config

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Beginning:
    """How a student begins.

    Attributes:
        shape: how much smaller it is than the teacher; None: as its own config.json says.
        start: see `initial_weights`; None: slices.
        seed: of what is drawn.

    Raises:
        ConfigError: there is no such start.
    """

    shape: Shape | None = None
    start: Start | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start is not None and self.start not in STARTS:
            raise ConfigError(f"A student cannot begin as {self.start!r}.", remedy=f"Allowed: {', '.join(STARTS)}.")


def is_bare(folder: Path) -> bool:
    """Whether a folder says what a model is like and holds no weights of it."""
    return (folder / CONFIG_NAME).is_file() and not any(file for kind in _WEIGHTS for file in folder.glob(kind))


def make_student(teacher: PlannedModel, bare: Path | None, beginning: Beginning, folder: Path) -> None:
    """Write a student's first weights into `folder`, which appears whole or not at all.

    Args:
        bare: a folder with its config.json; None: the teacher's, made smaller.

    Raises:
        ConfigError, UnsupportedError, CheckpointError: no model can be as that config says.
    """
    config = dict(teacher.base.config) if bare is None else read_json(bare, CONFIG_NAME)
    where = f"{teacher.base.config_place}, made smaller" if bare is None else str(bare / CONFIG_NAME)
    config = smaller_config(config, beginning.shape or Shape())
    family, spec = read_spec(config, where)
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)
    by_slot = {weight.slot.name: weight for weight in teacher.planned}
    weights = initial_weights(
        spec,
        teacher.spec,
        lambda slot: by_slot[slot].unprepared().dequantize(torch.float32),
        beginning.start or "slices",
        config.get("initializer_range"),
        beginning.seed,
    )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for slot, value in weights:
            yield family.logical_name(slot), (value.t() if slot.is_transposed else value).to(dtype).contiguous()

    with resumable_folder(folder, lambda partial: False) as made:
        write_json(made / CONFIG_NAME, _declared(config, dtype))
        write_checkpoint(made, tensors())
        carry_files(teacher.base.store, made)


def _declared(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {**config, "dtype": str(dtype).removeprefix("torch.")}
