"""One checkpoint → the same model in another precision, in compressed-tensors' layouts.

In: a wide checkpoint. Out: a folder that `amalgam`, transformers and vLLM can read, and a report of bytes and errors.
Attention, MLP and expert projections are quantized; embeddings, head, routers, norms and biases stay as they are. So
does what the checkpoint holds beside the model: layers that predict further tokens, tables that are computed anyway.
The report names what is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from amalgam.base.files import new_folder
from amalgam.base.locks import FileLock
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.carry import carry_files, left_out_tensors, write_json
from amalgam.composition.check import HEAD, check_leftovers
from amalgam.composition.planned import oriented
from amalgam.composition.progress import Progress
from amalgam.composition.source import CONFIG_NAME, Source
from amalgam.errors import CheckpointError, ConfigError
from amalgam.formats.contract import Scheme, StoredWeight, WritableFormat
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.models.registry import fused_tensors, read_spec
from amalgam.models.spec import Family, ModelSpec, Slot
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

_DRAFTS_KEY = "num_nextn_predict_layers"
_LAYER = re.compile(r"(.*?\b(?:layers|blk)\.(\d{1,6}))\.")


@dataclass
class RoleReport:
    """What quantizing did to the weights of one role. `error` is the root mean square of (new - old) / old, overall."""

    num_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass
class QuantizeReport:
    """What `quantize_checkpoint` wrote.

    Attributes:
        carried: weights beside the model's own, copied as they are.
        left_out_tensors, left_out_files: of the checkpoint, not in the folder.
        config_changes: keys of config.json that say something else now, besides the quantization.
    """

    folder: Path
    format: str
    roles: dict[str, RoleReport] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    left_out_tensors: list[str] = field(default_factory=list)
    left_out_files: list[str] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        return sum(role.bytes_before for role in self.roles.values())

    @property
    def bytes_after(self) -> int:
        return sum(role.bytes_after for role in self.roles.values())


def quantize_checkpoint(
    checkpoint: str,
    out_folder: Path,
    format_name: str,
    options: QuantizeOptions = QuantizeOptions(),
    progress: Progress | None = None,
    carries_others: bool = True,
    lock: FileLock | None = None,
) -> QuantizeReport:
    """Quantize the linear weights of `checkpoint` into `out_folder`, which appears complete or not at all.

    Args:
        carries_others: copy the weights that the checkpoint holds beside the model's own.
        lock: of `out_folder`, held by the caller; None: it is taken here.

    Raises:
        CheckpointError: the folder exists, or the checkpoint is damaged, holds no wide linear weights, or weights that
            the model has no place for.
        ConflictError: another process is writing the folder.
        ConfigError: an option that the format does not take, or a group size that does not divide.
        UnsupportedError: a format that cannot be made.
    """
    weight_format = writable_format(format_name)
    source = Source.open("base", checkpoint, fused_tensors)
    if not source.config:
        raise CheckpointError(source.config_place, remedy=f"The model's sizes stand in {CONFIG_NAME}.")
    family, spec = read_spec(source.config, source.config_place)
    slots = {family.logical_name(slot): slot for slot in spec.slots}
    source = replace(source, weights=family.with_optional_prefix(source.weights, slots))
    missing = [name for name in slots if name not in source.weights]
    if missing:
        raise CheckpointError(f"{source.folder} lacks {len(missing)} weights, for instance {missing[0]!r}.")
    narrow = [name for name in slots if not source.weights[name].is_wide]
    if narrow:
        raise CheckpointError(
            f"{source.folder} is quantized already: {len(narrow)} weights, for instance {narrow[0]!r}.",
            remedy="Give the bf16, fp16 or fp32 checkpoint.",
        )
    report = QuantizeReport(out_folder, format_name)
    others = _besides(source, family, spec, slots)
    report.carried = others if carries_others else []
    report.left_out_tensors = left_out_tensors(source, {*slots, *report.carried})
    if source.config.get(_DRAFTS_KEY) and _drafts(report.left_out_tensors, spec):
        report.config_changes[_DRAFTS_KEY] = 0
    writer = _QuantizedTensors(source, weight_format, options, report, progress)
    drafts = _drafts(report.carried, spec)
    with new_folder(out_folder, lock) as temporary:
        write_checkpoint(temporary, writer.tensors(slots))
        config = {
            **source.config,
            **report.config_changes,
            "quantization_config": writer.quantization_config(slots, drafts),
        }
        if source.store.metadata and "dtype" not in config:
            config["dtype"] = _main_dtype(source, slots)
        write_json(temporary / CONFIG_NAME, config)
        report.left_out_files = carry_files(source.store, temporary)
    return report


def _besides(source: Source, family: Family, spec: ModelSpec, slots: dict[str, Slot]) -> list[str]:
    """Weights that the checkpoint holds beside the model's, to be copied; draft layers as a whole or not at all."""
    tied = {HEAD} if spec.has_tied_head else set()
    check_leftovers(source, family, spec, {*slots, *tied})
    others = [name for name in source.weights if name not in slots]
    wide = [name for name in others if source.weights[name].is_wide]
    if len(wide) < len(others):  # some are quantized: in what way, the new configuration cannot say
        drafts = set(_drafts(wide, spec))
        wide = [name for name in wide if name not in drafts]
    return wide


def _drafts(names: list[str], spec: ModelSpec) -> list[str]:
    """Weights of layers behind the decoder's last one."""
    layers = ((name, _LAYER.match(name)) for name in names)
    return [name for name, layer in layers if layer is not None and int(layer[2]) >= spec.num_layers]


def _main_dtype(source: Source, slots: dict[str, Slot]) -> str:
    """The type that most weights of a GGUF file have: its metadata do not say."""
    sizes: Counter[str] = Counter()
    for name in slots:
        for part in source.weights[name].parts.values():
            sizes[str(part.dtype).removeprefix("torch.")] += part.nbytes
    return sizes.most_common(1)[0][0]


class _QuantizedTensors:
    """Quantizes weight by weight while they are written, and remembers how."""

    def __init__(
        self,
        source: Source,
        weight_format: WritableFormat,
        options: QuantizeOptions,
        report: QuantizeReport,
        progress: Progress | None,
    ) -> None:
        self.report = report
        self._source = source
        self._format = weight_format
        self._options = options
        self._progress = progress
        self._schemes: dict[str, tuple[Scheme, list[str]]] = {}

    def tensors(self, slots: dict[str, Slot]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the new checkpoint."""
        total = sum(self._source.weights[name].nbytes for name in slots)
        done = 0
        for name, slot in slots.items():
            stored = self._source.weights[name]
            if slot.is_linear and slot.role != "head":
                yield from self._quantize(name, slot, stored)
            else:
                yield name, self._source.load(stored).dense
                self._count(slot, stored.nbytes, stored.nbytes)
            done += stored.nbytes
            if self._progress is not None:
                self._progress(f"Quantizing to {self._format.name}", done, total)
        for name in self.report.carried:
            yield name, self._source.load(self._source.weights[name]).dense

    def _quantize(self, name: str, slot: Slot, stored: StoredWeight) -> Iterator[tuple[str, torch.Tensor]]:
        wide = self._source.load(stored, lambda packed: oriented(packed, stored, slot)).dequantize()
        if not bool(torch.isfinite(wide).all()):
            raise CheckpointError(f"Weight {name!r} in {self._source.folder} holds NaN or infinity.")
        try:
            encoded = quantize(wide, self._format, round_to_nearest, self._options)
        except ConfigError as error:
            raise ConfigError(f"Weight {name!r}: {error.what}", remedy=error.remedy) from None
        module = name.removesuffix(".weight")
        for suffix, tensor in encoded.tensors.items():
            yield f"{module}.{suffix}", tensor
        scheme = self._format.scheme(encoded.grid)
        self._schemes.setdefault(json.dumps(scheme.arguments), (scheme, []))[1].append(module)
        restored = self._format.pack(encoded).dequantize()
        size = sum(tensor.nbytes for tensor in encoded.tensors.values())
        role = self._count(slot, stored.nbytes, size)
        role.squared_error += float((restored - wide.float()).square().sum())
        role.squared_norm += float(wide.float().square().sum())

    def _count(self, slot: Slot, before: int, after: int) -> RoleReport:
        role = self.report.roles.setdefault(slot.role, RoleReport())
        role.num_weights += 1
        role.bytes_before += before
        role.bytes_after += after
        return role

    def quantization_config(self, slots: dict[str, Slot], drafts: list[str]) -> dict[str, Any]:
        """`quantization_config` as compressed-tensors 0.20 reads it: weight-only groups, one per scheme.

        One scheme applies to all linear layers by class; several name their modules.
        """
        quantized = {module for _, modules in self._schemes.values() for module in modules}
        ignore = [
            module
            for name, slot in slots.items()
            if slot.role in {"head", "router"} and (module := name.removesuffix(".weight")) not in quantized
        ]
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(self._schemes) == 1 else modules,
                "weights": dict(scheme.arguments),
                "input_activations": None,
                "output_activations": None,
                "format": scheme.layout,
            }
            for index, (scheme, modules) in enumerate(self._schemes.values())
        }
        layouts = {scheme.layout for scheme, _ in self._schemes.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": layouts.pop(),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [
                "lm_head",
                *(module for module in ignore if module != "lm_head"),
                *sorted({f"re:{re.escape(layer[1])}\\..*" for name in drafts if (layer := _LAYER.match(name))}),
            ],
            "kv_cache_scheme": None,
        }
