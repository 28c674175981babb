"""One checkpoint → the same model in another precision, in compressed-tensors' layouts.

In: a wide checkpoint. Out: a folder that `amalgam`, transformers and vLLM can read, and a report of bytes and errors.
Attention, MLP and expert projections are quantized; embeddings, head, routers, norms and biases stay as they are. So
does what the checkpoint holds beside the model: layers that predict further tokens, tables that are computed anyway.
The report names what is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from amalgam.base.files import check_free, resumable_folder, writing
from amalgam.base.locks import FileLock
from amalgam.calibration.stream import Stream
from amalgam.checkpoint.writer import shard_name
from amalgam.composition.carry import (
    LAYER,
    carry_files,
    drafts_among,
    left_out_tensors,
    weights_besides,
    without_drafts,
    write_json,
)
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.planned import oriented
from amalgam.composition.progress import Progress
from amalgam.composition.quantizing.recipe import Recipe, input_arguments
from amalgam.composition.quantizing.report import QuantizeReport
from amalgam.composition.quantizing.shards import Shards, has_shards
from amalgam.composition.quantizing.weights import LayerResult, WeightQuantizer
from amalgam.composition.source import Source
from amalgam.composition.wide import WideModel, layer_of
from amalgam.errors import CheckpointError
from amalgam.formats.contract import WritableFormat
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import ModelSpec, Slot
from amalgam.text.tokenizer import Tokenizer
from amalgam.version import __version__

SHARD_BYTES = 2 * 2**30


def quantize_checkpoint(
    checkpoint: str,
    out_folder: Path,
    format_name: str,
    options: QuantizeOptions = QuantizeOptions(),
    progress: Progress | None = None,
    carries_others: bool = True,
    lock: FileLock | None = None,
) -> QuantizeReport:
    """`make_checkpoint` by rounding to nearest."""
    return make_checkpoint(checkpoint, out_folder, Recipe(format_name, options), progress, carries_others, lock)


def make_checkpoint(
    checkpoint: str,
    out_folder: Path,
    recipe: Recipe,
    progress: Progress | None = None,
    carries_others: bool = True,
    lock: FileLock | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizeReport:
    """Quantize the linear weights of `checkpoint` into `out_folder`, which appears complete or not at all.

    What an interrupted run has finished is kept beside it, and the next run with the same recipe goes on from there.

    Args:
        carries_others: copy the weights that the checkpoint holds beside the model's own.
        lock: of `out_folder`, held by the caller; None: it is taken here.
        shard_bytes: of the wide weights that one file is made of, about; whole layers are never divided.

    Raises:
        CheckpointError: the folder exists, or the checkpoint is damaged, holds no wide linear weights, or weights that
            the model has no place for; it has no tokenizer, or another model's, and is to be calibrated; inputs of a
            projection are not finite; the disk is full.
        ConflictError: another process is writing the folder, or an interrupted run with another recipe has left a part.
        ConfigError: an option that the format does not take, or a group size that does not divide; texts that cannot be
            read or are too short.
        UnsupportedError: a format that cannot be made.
    """
    weight_format = writable_format(recipe.format_name)
    recipe.check(weight_format)
    check_free(out_folder)
    model = WideModel.open(checkpoint)
    source, family, spec, slots = model.source, model.family, model.spec, dict(model.slots)
    report = QuantizeReport(out_folder, recipe.format_name, recipe.method)
    others = weights_besides(source, family, spec, slots)
    report.carried = others if carries_others else []
    report.left_out_tensors = left_out_tensors(source, {*slots, *report.carried})
    report.config_changes |= without_drafts(source.config, report.left_out_tensors, spec)
    work = _Work(source, spec, slots, recipe, weight_format, report, progress)
    with resumable_folder(out_folder, has_shards, lock) as folder, writing(out_folder):
        work.write(folder, shard_bytes)
        config = {
            **source.config,
            **report.config_changes,
            "quantization_config": work.quantization_config(drafts_among(report.carried, spec)),
        }
        if source.store.metadata and "dtype" not in config:
            config["dtype"] = model.main_dtype
        write_json(folder / CONFIG_NAME, config)
        report.left_out_files = carry_files(source.store, folder)
    return report


@dataclass(frozen=True)
class _Unit:
    """Weights that are made together: a layer, or what stands before or behind all of them.

    Attributes:
        layer_id: None outside the layers.
    """

    layer_id: int | None
    names: list[str]


class _Work:
    """Makes the files, unit by unit."""

    def __init__(
        self,
        source: Source,
        spec: ModelSpec,
        slots: dict[str, Slot],
        recipe: Recipe,
        weight_format: WritableFormat,
        report: QuantizeReport,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._spec = spec
        self._slots = slots
        self._recipe = recipe
        self._quantizer = WeightQuantizer(recipe, weight_format)
        self._report = report
        self._progress = progress
        self._token_ids: list[list[int]] = []
        if recipe.texts is not None:
            tokenizer = Tokenizer.load(source.folder, source.store.metadata)
            self._token_ids = recipe.texts.read(tokenizer, spec)
            report.num_tokens = sum(map(len, self._token_ids))
        self._schemes: dict[str, list[str]] = {}  # a scheme as JSON → the modules that are declared so
        self._total = sum(source.weights[name].nbytes for name in slots)
        self._done = 0

    def write(self, folder: Path, shard_bytes: int) -> None:
        """All files, beginning behind those that are there."""
        parts = self._parts(shard_bytes)
        shards = Shards(folder, len(parts), self._settings(shard_bytes))
        if shards.notes:
            self._report.num_resumed = shards.num_complete
            self._report.restore(shards.notes["report"])
            self._schemes = dict(shards.notes["schemes"])
        stream = self._stream()
        for number, part in enumerate(parts[: shards.num_complete], 1):
            file = folder / shard_name(number, len(parts))
            with safe_open(file, "pt") as written:
                for unit in part:
                    self._pass(unit, written, stream)
        for part in parts[shards.num_complete :]:
            tensors: dict[str, Tensor] = {}
            for unit in part:
                tensors |= self._made(unit, stream)
            shards.add(tensors, {"report": self._report.progress(), "schemes": self._schemes})
        shards.finish()

    def _settings(self, shard_bytes: int) -> dict[str, Any]:
        """What the files' bytes depend on."""
        identities = [
            self._source.identity(self._source.weights[name]) for name in (*self._slots, *self._report.carried)
        ]
        return {
            "checkpoint": str(self._source.folder),
            "weights": hashlib.sha256(repr(identities).encode()).hexdigest()[:16],
            "carried": len(self._report.carried),
            "shard_bytes": shard_bytes,
            "version": __version__,
            **self._recipe.describe(),
        }

    def _parts(self, shard_bytes: int) -> list[list[_Unit]]:
        """Units by the file that they go to."""
        parts: list[list[_Unit]] = []
        room = 0
        for unit in self._units():
            size = sum(self._source.weights[name].nbytes for name in unit.names)
            if not parts or room < size:
                parts.append([])
                room = shard_bytes
            parts[-1].append(unit)
            room -= size
        return parts

    def _units(self) -> Iterator[_Unit]:
        for layer_id, group in groupby(self._slots, lambda name: layer_of(self._slots[name])):
            yield _Unit(layer_id, list(group))
        for name in self._report.carried:
            yield _Unit(None, [name])

    # --- Calibration ---

    def _stream(self) -> Stream | None:
        if self._recipe.texts is None:
            return None
        outside = {
            slot.name: self._wide(name, slot)
            for name, slot in self._slots.items()
            if slot.role != "head" and layer_of(slot) is None
        }
        return Stream(self._spec, self._token_ids, outside, min_expert_tokens=self._recipe.texts.min_expert_tokens)

    def _pass(self, unit: _Unit, written: Any, stream: Stream | None) -> None:
        """A unit whose weights an earlier run has written: only the texts still have to go through it."""
        self._advance(*unit.names)
        if stream is None or unit.layer_id is None:
            return
        weights = self._layer(unit)
        for name in unit.names:
            slot = self._slots[name]
            if _is_quantized(slot):
                module = name.removesuffix(".weight")
                keys = [key for key in written.keys() if key.rpartition(".")[0] == module]  # noqa: SIM118
                tensors = {key.rpartition(".")[2]: written.get_tensor(key) for key in keys}
                weights[slot.name] = self._quantizer.restored(name, weights[slot.name].dense, tensors)
        stream.run(unit.layer_id, weights)

    def _layer(self, unit: _Unit) -> dict[str, PackedWeight]:
        """Its weights by slot; all of them are finite."""
        weights = {self._slots[name].name: self._wide(name, self._slots[name]) for name in unit.names}
        for name in unit.names:
            self._check_finite(name, weights[self._slots[name].name].dense)
        return weights

    # --- Weights ---

    def _made(self, unit: _Unit, stream: Stream | None) -> dict[str, Tensor]:
        """The tensors of a unit."""
        layer: LayerResult | None = None
        if stream is not None and unit.layer_id is not None:
            names = {self._slots[name].name: name for name in unit.names}
            weights = self._layer(unit)
            layer = self._quantizer.layer(
                self._spec, unit.layer_id, weights, stream, lambda slot: self._advance(names[slot])
            )
            self._report.expert_tokens |= layer.expert_tokens
            self._report.rounded += [names[slot] for slot in layer.rounded]
        tensors: dict[str, Tensor] = {}
        for name in unit.names:
            slot, stored = self._slots.get(name), self._source.weights[name]
            if slot is None or not _is_quantized(slot):
                tensors[name] = self._source.load(stored).dense
                if slot is not None:
                    self._report.count(slot.role, stored.nbytes, stored.nbytes)
                    self._advance(name)
                continue
            found = None if layer is None else layer.weights.pop(slot.name, None)
            if found is None:
                wide = self._wide(name, slot).dense
                found = self._quantizer.alone(name, wide)
                if not math.isfinite(found.squared_norm):  # a look at each value only where there is reason to
                    self._check_finite(name, wide)
                self._advance(name)
                if layer is not None:  # a family's own block reads it, out of sight
                    self._report.rounded.append(name)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in found.tensors.items()}
            self._schemes.setdefault(json.dumps(vars(found.scheme)), []).append(module)
            role = self._report.count(slot.role, stored.nbytes, found.nbytes)
            role.squared_error += found.squared_error
            role.squared_norm += found.squared_norm
        return tensors

    def _wide(self, name: str, slot: Slot) -> PackedWeight:
        """A weight as the model has it."""
        stored = self._source.weights[name]
        return dense(self._source.load(stored, lambda packed: oriented(packed, stored, slot)).dequantize())

    def _check_finite(self, name: str, weight: Tensor) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"Weight {name!r} in {self._source.folder} holds NaN or infinity.")

    def _advance(self, *names: str) -> None:
        self._done += sum(self._source.weights[name].nbytes for name in names if name in self._slots)
        if self._progress is not None:
            self._progress(f"Quantizing to {self._recipe.format_name}", self._done, self._total)

    # --- What is declared ---

    def quantization_config(self, drafts: list[str]) -> dict[str, Any]:
        """`quantization_config` as compressed-tensors 0.20 reads it: groups, one per scheme.

        One scheme applies to all linear layers by class; several name their modules.
        """
        quantized = {module for modules in self._schemes.values() for module in modules}
        ignore = [
            module
            for name, slot in self._slots.items()
            if (slot.role == "head" or slot.decides) and (module := name.removesuffix(".weight")) not in quantized
        ]
        schemes = [(json.loads(scheme), modules) for scheme, modules in self._schemes.items()]
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(schemes) == 1 else modules,
                "weights": scheme["arguments"],
                "input_activations": input_arguments(self._recipe.activations, scheme["arguments"]),
                "output_activations": None,
                "format": scheme["layout"],
            }
            for index, (scheme, modules) in enumerate(schemes)
        }
        first, _ = schemes[0]  # all are of one format
        return {
            "quant_method": "compressed-tensors",
            "format": first["layout"],
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [
                "lm_head",
                *(module for module in ignore if module != "lm_head"),
                *sorted({f"re:{re.escape(layer[1])}\\..*" for name in drafts if (layer := LAYER.match(name))}),
            ],
            "kv_cache_scheme": None,
        }


def _is_quantized(slot: Slot) -> bool:
    return slot.is_linear and slot.role != "head"
