"""`--to modelopt`: the quantized Hugging Face layout of NVIDIA ModelOpt, of which TensorRT-LLM builds its engines.

`hf_quant_config.json` names an algorithm for each layer (`MIXED_PRECISION`, `quantized_layers`), and config.json says
the same in compressed-tensors' words, as ModelOpt 0.47 writes both (`modelopt/torch/export`):

    FP8_PER_CHANNEL_PER_TOKEN  weight E4M3 [out, in],     weight_scale [out]
    fp8_pb_wo                  weight E4M3 [out, in],     weight_scale [out / 128, 1, in / 128, 1]
    W8A16                      weight int8 [out, in],     weight_scale [out]
    W4A16_AWQ                  weight uint8 [out / 2, in], weight_scale [out, groups]
    W4A16_NVFP4                weight uint8 [out, in / 2], weight_scale E4M3 [out, in / 16], weight_scale_2 []
    MXFP8                      weight E4M3 [out, in],     weight_scale uint8 [out, in / 32]

`FP8` and `NVFP4` themselves need constant scales of activations; the algorithms above do not, and hold the same
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from amalgam.errors import ConfigError
from amalgam.formats.contract import StoredWeight
from amalgam.models.spec import Slot
from amalgam.tools.export.checkpoint import CheckpointJob, Dialect
from amalgam.tools.export.choosing import (
    Decision,
    Engine,
    Unit,
    choose,
    experts_by_layer,
    fused_projections,
)
from amalgam.tools.export.contract import ExportOptions, Job, PlannedModel, Target
from amalgam.tools.export.encoding import modelopt
from amalgam.tools.export.forms import Form
from amalgam.version import __version__

_BLOCK = (128, 128)
_ROUNDED = "TensorRT-LLM rounds the activations of fp8 weights to 8 bits as it runs, which no figure of amalgam shows."


def prepare(model: PlannedModel, options: ExportOptions) -> Job:
    if options.share == "none":
        raise ConfigError("--share is 'none', and TensorRT-LLM builds of nothing of that kind.", remedy="Leave it out.")

    def units(model: PlannedModel) -> Iterator[Unit]:
        return chain(experts_by_layer(model), fused_projections(model))

    decisions = choose(model, Engine("TensorRT-LLM", _takes, units), options.share)
    notes = [_ROUNDED] if any(decision.form.kind == "fp8" for decision in decisions) else []
    return CheckpointJob(model, decisions, Dialect("modelopt", modelopt, _is_native, _declare), notes)


def _takes(slot: Slot, form: Form) -> bool:
    if slot.role == "head" or slot.is_transposed:
        return False
    if form.kind == "int":
        is_plain = not (form.has_zero or form.is_reordered)
        is_int4 = form.bits == 4 and form.strategy == "group" and slot.shape[0] % 2 == 0
        return is_plain and (is_int4 or (form.bits == 8 and not form.is_packed and form.strategy == "channel"))
    if form.kind == "fp8":
        return form.strategy == "channel" or form.block == _BLOCK
    return form.kind in ("nvfp4", "mxfp8")


def _is_native(form: Form, stored: StoredWeight) -> bool:
    return stored.format.name in ("modelopt-int4", "modelopt-nvfp4")


def _declare(
    decisions: Sequence[Decision], modules: Mapping[str, str], others: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    layers = {modules[decision.name]: _algorithm(decision.form) for decision in decisions if not decision.form.is_float}
    if not layers:
        return {}, {}
    excluded = [
        modules[decision.name]
        for decision in decisions
        if decision.form.is_float and (decision.weight.slot.is_linear or decision.weight.slot.decides)
    ]
    algorithms = list({str(each): each for each in layers.values()}.values())
    quantization: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    if len(algorithms) == 1:
        quantization |= algorithms[0] | {"exclude_modules": _wildcards([*excluded, *others], layers)}
    else:
        quantization["quantized_layers"] = layers
    producer = {"name": "amalgam", "version": __version__}
    groups: dict[str, Any] = {}
    for index, algorithm in enumerate(algorithms):
        names = sorted(name for name, each in layers.items() if each == algorithm)
        groups[f"group_{index}"] = _GROUPS[algorithm["quant_algo"]](algorithm) | {
            "targets": names if len(algorithms) > 1 else ["Linear"]
        }
    config = {
        "config_groups": groups,
        **({"quantized_layers": layers} if len(algorithms) > 1 else {}),
        "ignore": quantization.get("exclude_modules", []),
        "quant_algo": quantization["quant_algo"],
        "producer": producer,
        "quant_method": "modelopt",
    }
    return {"quantization_config": config}, {
        "hf_quant_config.json": {"producer": producer, "quantization": quantization}
    }


def _algorithm(form: Form) -> dict[str, Any]:
    """What ModelOpt calls a form, in `quantized_layers`."""
    if form.kind == "int" and form.bits == 4:
        assert form.block is not None
        extras = {"group_size": form.block[1], "has_zero_point": False, "pre_quant_scale": False}
        return {"quant_algo": "W4A16_AWQ", **extras}
    if form.kind == "int":
        return {"quant_algo": "W8A16"}
    if form.kind == "fp8":
        return {"quant_algo": "fp8_pb_wo" if form.strategy == "block" else "FP8_PER_CHANNEL_PER_TOKEN"}
    return {"quant_algo": "MXFP8", "group_size": 32} if form.kind == "mxfp8" else _NVFP4


def _wildcards(excluded: Sequence[str], quantized: Mapping[str, Any]) -> list[str]:
    """Modules that are left alone: with `*` for a layer's number where no layer has them quantized."""
    shapes = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in quantized}
    found = dict.fromkeys(["lm_head"])
    for name in excluded:
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        found[name if shape in shapes else shape] = None
    return list(found)


def _weights(bits: int, kind: str, **more: Any) -> dict[str, Any]:
    return {"weights": {"dynamic": False, "num_bits": bits, "type": kind, **more}}


_INPUTS_FP8 = {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"}}
_NVFP4 = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
# The same in compressed-tensors' words, by algorithm.
_GROUPS = {
    "FP8_PER_CHANNEL_PER_TOKEN": lambda _: _INPUTS_FP8 | _weights(8, "float", strategy="channel"),
    "fp8_pb_wo": lambda _: _weights(8, "float", strategy="block"),
    "W8A16": lambda _: _weights(8, "int"),
    "W4A16_AWQ": lambda algorithm: _weights(4, "int", group_size=algorithm["group_size"]),
    "W4A16_NVFP4": lambda algorithm: _weights(4, "float", group_size=algorithm["group_size"]),
    "MXFP8": lambda algorithm: _weights(8, "float", group_size=algorithm["group_size"]),
}

TARGET = Target(
    "modelopt",
    "ModelOpt's quantized Hugging Face layout, for TensorRT-LLM",
    prepare,
    frozenset({"share"}),
)
