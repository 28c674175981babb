"""What a running model says of itself.

In: the weights that are served, the engine, the settings. Out: JSON: what `GET /model_info` and `GET /manifest` answer,
and what an expert is made of. Must never know: who asks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from amalgam.config.settings import Settings
from amalgam.engine.core import Engine
from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.memory import peak_memory_bytes
from amalgam.engine.speculation.draft import DraftProposer
from amalgam.engine.speculation.speculator import Speculator
from amalgam.errors import RequestError
from amalgam.experts.precision_map import PROJECTIONS
from amalgam.models.weights import WeightVersion
from amalgam.runtime.devices import device_figures
from amalgam.runtime.preview import Contents
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.versions import LiveVersion, VersionState


def describe_versions(live: Sequence[LiveVersion]) -> list[dict[str, Any]]:
    """Weight versions in memory: what `GET /weights` tells of each."""
    holders = Counter(id(weight) for one in live for weight in {id(w): w for w in one.version.weights}.values())
    return [
        {
            "version": one.version.version_id,
            "states": [state.value for state in one.states],
            "names": list(one.names),
            "pinned": VersionState.PINNED in one.states,
            "fingerprint": one.version.fingerprint,
            "rules": [rule.model_dump() for rule in one.served.rules],
            "bytes": one.version.nbytes,
            "own_bytes": sum(weight.nbytes for weight in one.version.weights if holders[id(weight)] == 1),
            "bytes_by_format": Contents.of(one.version).bytes_by_format,
            "bytes_by_device": Contents.of(one.version).bytes_by_device(one.served.loader.devices.primary),
            "created": one.served.created_at,
            "age_seconds": one.age_seconds,
            "requests": one.num_requests,
        }
        for one in live
    ]


def describe_model(
    name: str, settings: Settings, served: ServedWeights, engine: Engine, defaults: ModelDefaults, load_seconds: float
) -> dict[str, Any]:
    """Architecture, sizes, sources, weights and bytes by precision, memory, and what runs a step."""
    spec, version, loader = served.spec, served.version, served.loader
    by_format: dict[str, dict[str, int]] = defaultdict(lambda: {"weights": 0, "parameters": 0, "bytes": 0})
    by_source: dict[str, dict[str, int]] = defaultdict(lambda: {"weights": 0, "bytes": 0})
    for slot, origin in version.origins.items():
        for row in (by_format[origin.format], by_source[origin.source]):
            row["weights"] += 1
            row["bytes"] += version[slot].nbytes
        by_format[origin.format]["parameters"] += math.prod(origin.shape)
    status = engine.status()
    return {
        "model": name,
        "architecture": loader.family.architectures[0],
        "family": spec.family,
        "sizes": {
            "layers": spec.num_layers,
            "moe_layers": len(spec.moe_layer_ids),
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "experts_per_layer": spec.num_experts,
            "active_experts_per_token": spec.num_active_experts,
            "kv_heads": max(heads for heads, _, _ in spec.kv_shapes),
            "max_seq_length": settings.inference.max_seq_length,
        },
        "parameters": {"total": spec.num_parameters, "active_per_token": spec.num_active_parameters},
        "sources": {
            name: {"path": path, **by_source.get(name, {"weights": 0, "bytes": 0})}
            for name, path in loader.sources.items()
        },
        "precisions": dict(by_format),
        "rules": [rule.model_dump() for rule in served.rules],
        "sampling_defaults": defaults.as_json(),
        "default_source": settings.model.mixed_precision.default_source,
        "weight_version": {
            "version": version.version_id,
            "fingerprint": version.fingerprint,
            "requests_by_version": {str(key): count for key, count in status.versions.items()},
        },
        "memory": {
            "weights_bytes": version.nbytes,
            "mapped_bytes": version.mapped_bytes,
            "kv_cache_bytes": engine.kv_cache_bytes,
            "state_cache_bytes": engine.state_cache_bytes,
            "process_peak_bytes": peak_memory_bytes(),
        },
        "kv_blocks": {"total": status.num_blocks, "free": status.num_free_blocks},
        "device": str(loader.device),
        "devices": describe_devices(served, engine),
        "dtype": settings.inference.dtype,
        "activation": loader.activation if multiplies_integers(settings.inference.dtype, loader.device) else None,
        "kv_dtype": settings.inference.dtype if settings.engine.kv_dtype == "auto" else settings.engine.kv_dtype,
        "compute_threads": torch.get_num_threads(),
        "kernels": engine.kernels,
        "speculation": None if engine.speculator is None else describe_speculation(engine.speculator, version),
        "load_seconds": round(load_seconds, 3),
    }


def describe_devices(served: ServedWeights, engine: Engine) -> dict[str, Any]:
    """Each device that weights may lie on: what of the version is there, and what went to and fro."""
    sizes = Contents.of(served.version).bytes_by_device(served.loader.devices.primary)
    return {
        name: {"bytes": sizes.get(name, 0), **asdict(figures)}
        for name, figures in device_figures(served, engine).items()
    }


def multiplies_integers(dtype: str, device: torch.device) -> bool:
    """Whether `inference.activation` makes a difference to integer weights."""
    return dtype == "bfloat16" and device.type == "cpu"


def describe_speculation(speculator: Speculator, version: WeightVersion) -> dict[str, Any]:
    """Who guesses tokens, and what has come of it since the start.

    Args:
        version: the model's own weights.
    """
    counts, proposer = speculator.counts, speculator.proposer
    draft = None
    if isinstance(proposer, DraftProposer):
        weights = proposer.version
        shared = [slot for slot, key in weights.keys.items() if version.keys.get(slot) == key]
        shared_bytes = sum(weights[slot].nbytes for slot in shared)
        draft = {
            "weights_bytes": weights.nbytes - shared_bytes,  # that are there for the draft alone
            "shared_bytes": shared_bytes,
            "kv_cache_bytes": proposer.kv_cache_bytes,
        }
    return {
        "kind": speculator.kind,
        "num_tokens": speculator.num_tokens,
        "drafts": counts.num_drafts,
        "declined": counts.num_declined,
        "proposed_tokens": counts.num_proposed,
        "accepted_tokens": counts.num_accepted,
        "accepted_by_position": list(counts.accepted_at),
        "acceptance": counts.acceptance,
        "tokens_per_draft": 1 + counts.num_accepted / counts.num_drafts if counts.num_drafts else None,
        "proposing_seconds": round(counts.proposing_seconds, 3),
        "costs": None if speculator.costs is None else speculator.costs.describe(),
        "draft": draft,
    }


def describe_manifest(version: WeightVersion, document: dict[str, Any]) -> dict[str, Any]:
    """A provenance manifest of `version`, with the layout that each weight has in memory."""
    for weight in document["weights"]:
        weight["layout"] = version[weight["slot"]].layout.name
    return {"version": version.version_id, **document}


def describe_projections(version: WeightVersion, layer_id: int, expert_id: int, primary: str) -> list[dict[str, Any]]:
    """Where each projection of one expert comes from, where it lies, and what it takes.

    Args:
        primary: name of the device that the model runs on.

    Raises:
        RequestError: the model has no such expert.
    """
    slots = {part: f"layers.{layer_id}.mlp.experts.{expert_id}.{part}" for part in PROJECTIONS}
    found = [(part, version.origins[slot]) for part, slot in slots.items() if slot in version.origins]
    if not found:
        raise RequestError(
            f"Layer {layer_id} has no expert {expert_id}.", remedy="GET /model_info has the model's sizes."
        )
    return [
        {
            "projection": part,
            "name": origin.name,
            "source": origin.source,
            "format": origin.format,
            "reason": origin.rule,
            "device": origin.device or primary,
            "bytes": version[origin.slot].nbytes,
            "bits": version[origin.slot].nbytes * 8 / math.prod(origin.shape),
        }
        for part, origin in found
    ]
