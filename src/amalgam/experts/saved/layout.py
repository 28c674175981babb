"""A saved set as named arrays and a text.

In and out: `SavedSet`; `ArrayFile`, whatever its container. Must never know: files, the tracker.

Layout, version 1:

    meta              JSON {version, model, layer_ids, num_experts, num_active_experts, start, end, labels,
                      tick_seconds: what a tick of the history takes; old files lack it,
                      expert_counts: of each layer; only where some have fewer than num_experts}
    counts, gate_mass, num_tokens, num_requests            the `Tally` of everything
    label_counts, label_gate_mass, label_num_tokens, label_num_requests    the same with a leading axis, one per label
    last_activation   float64 [layers, experts], Unix seconds, NaN: never
    pair_tokens, together, onward                          the `PairCounts`; absent where none were kept
    bucket_ticks, bucket_counts, …                         the history, only in a file that a server goes on from

In an `.npz` file `meta` is an array of uint8, in a safetensors file an entry of the header's metadata. Counts may have
any integer type.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.base.fields import Fields
from amalgam.base.strict_json import parse_json
from amalgam.errors import ConfigError
from amalgam.experts.history import NUM_PHASES, Bucket, Tally
from amalgam.experts.labels import check_label
from amalgam.experts.pairs import PairCounts
from amalgam.experts.saved.arrays import ArrayFile
from amalgam.experts.saved.sets import SavedSet

MAX_BYTES = 2**31  # of the file, and of what it unpacks to
_VERSION = 1
_MAX_META_BYTES = 2**20
_MAX_LAYERS, _MAX_EXPERTS = 1024, 65536  # as of a model
_MAX_MODEL_CHARS = 1024
_MAX_COUNT = 2**46  # nothing counts so far, and a layer's sum stays within int64
_LAST_TIME = 253_402_300_800.0  # the year 10000, Unix seconds
_TALLY_FIELDS = ("counts", "gate_mass", "num_tokens", "num_requests")


def to_arrays(saved: SavedSet) -> tuple[bytes, dict[str, npt.NDArray[Any]]]:
    """The text `meta`, and the arrays.

    Raises:
        ConfigError: it has more labels than a reader takes.
    """
    meta = {
        "version": _VERSION,
        "model": "".join(
            letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in saved.model[:_MAX_MODEL_CHARS]
        ),
        "layer_ids": saved.layer_ids,
        "num_experts": saved.num_experts,
        "num_active_experts": saved.num_active_experts,
        "start": saved.start,
        "end": saved.end,
        "labels": list(saved.labels),
        "tick_seconds": saved.tick_seconds,
        **({"expert_counts": saved.own_counts} if saved.own_counts else {}),
    }
    arrays: dict[str, npt.NDArray[Any]] = {"last_activation": saved.last_activation}
    for name in _TALLY_FIELDS:
        arrays[name] = getattr(saved.total, name)
        arrays |= _stacked(f"label_{name}", [getattr(tally, name) for tally in saved.labels.values()])
        arrays |= _stacked(f"bucket_{name}", [getattr(bucket.tally, name) for bucket in saved.buckets])
    if saved.buckets:
        arrays["bucket_ticks"] = np.array([(bucket.first, bucket.stop) for bucket in saved.buckets], np.int64)
    if saved.pairs is not None:
        arrays["pair_tokens"] = np.array(saved.pairs.num_tokens, np.int64)
        arrays |= {"together": saved.pairs.together, "onward": saved.pairs.onward}
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
    check_size(saved, "description", len(text), _MAX_META_BYTES)
    return text, arrays


def check_size(saved: SavedSet, part: str, num_bytes: int, limit: int) -> None:
    """What is about to be written.

    Raises:
        ConfigError: a reader would refuse it.
    """
    if num_bytes > limit:
        raise ConfigError(
            f"A saved set cannot hold these {len(saved.labels)} labels: its {part} would take {num_bytes} bytes, and "
            f"at most {limit} are read.",
            remedy="Put fewer sets together, or sets with fewer labels.",
        )


def from_arrays(file: ArrayFile) -> SavedSet:
    """
    Raises:
        Exception: it is no saved set; the kinds are many, the message says what is wrong.
    """
    meta = parse_json(file.text("meta", _MAX_META_BYTES))
    if not isinstance(meta, dict) or meta.get("version") != _VERSION:
        raise ValueError("its version is unknown")
    fields = Fields(meta, "its meta")
    layer_ids = tuple(fields.list("layer_ids", of=int, what="integers"))
    if list(layer_ids) != sorted(set(layer_ids)) or not set(layer_ids) <= set(range(_MAX_LAYERS)):
        fields.refuse("layer_ids", layer_ids, f"integers from 0 that rise, below {_MAX_LAYERS}")
    num_experts = fields.int("num_experts", high=_MAX_EXPERTS)
    top_k = fields.int("num_active_experts", high=num_experts)
    model, labels = fields.text("model"), fields.list("labels", of=str, what="strings")
    if len(model) > _MAX_MODEL_CHARS or not model.isprintable():
        fields.refuse("model", model, f"at most {_MAX_MODEL_CHARS} printable characters")
    for label in labels:
        check_label(label)
    if len(set(labels)) != len(labels):
        fields.refuse("labels", labels, "each of them once")
    start, end = (fields.float(name, low=0, high=_LAST_TIME) for name in ("start", "end"))
    tick_seconds = fields.float("tick_seconds", default=None, low=0, high=_LAST_TIME)
    if tick_seconds == 0:
        fields.refuse("tick_seconds", tick_seconds, "more than 0")
    if start > end:
        raise ValueError(f"it ends at {end}, before its start at {start}")
    own_counts = tuple(fields.list("expert_counts", of=int, what="integers", default=[]))
    if own_counts and (len(own_counts) != len(layer_ids) or not all(top_k <= n <= num_experts for n in own_counts)):
        fields.refuse("expert_counts", own_counts, f"one for each layer, from {top_k} to num_experts {num_experts}")
    grid = (len(layer_ids), num_experts)
    [total] = _tallies(file, "", (), grid, top_k)
    last_activation = file.read("last_activation", grid, "f")
    if not (np.isnan(last_activation) | _is_time(last_activation)).all():
        raise ValueError("last_activation has an impossible time")
    return SavedSet(
        model=model,
        layer_ids=layer_ids,
        num_experts=num_experts,
        num_active_experts=top_k,
        start=start,
        end=end,
        total=total,
        last_activation=last_activation.astype(np.float64),
        labels=dict(zip(labels, _tallies(file, "label_", (len(labels),), grid, top_k), strict=True)),
        pairs=_pairs(file, grid, int(total.num_tokens.sum())),
        buckets=_buckets(file, grid, top_k),
        tick_seconds=tick_seconds,
        own_counts=own_counts,
    )


def _stacked(name: str, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.stack(arrays)} if arrays else {}


def _tallies(
    file: ArrayFile, prefix: str, count: tuple[int] | tuple[()], grid: tuple[int, int], top_k: int
) -> list[Tally]:
    """One tally, or `count` of them from arrays that have a leading axis."""
    if count == (0,):
        return []
    num_layers, _ = grid
    counts = file.read(f"{prefix}counts", (*count, NUM_PHASES, *grid), "iu")
    gate_mass = file.read(f"{prefix}gate_mass", (*count, NUM_PHASES, *grid), "f")
    num_tokens = file.read(f"{prefix}num_tokens", (*count, NUM_PHASES), "iu")
    num_requests = file.read(f"{prefix}num_requests", count, "iu")
    for name, array in (("counts", counts), ("num_tokens", num_tokens), ("num_requests", num_requests)):
        if (array < 0).any() or (array > _MAX_COUNT).any():
            raise ValueError(f"{prefix}{name} is below zero or absurdly large")
    if not ((gate_mass >= 0) & (gate_mass <= _MAX_COUNT)).all():
        raise ValueError(f"{prefix}gate_mass is below zero, absurdly large or no number")
    expected = np.broadcast_to(num_tokens[..., None].astype(np.int64) * top_k, (*count, NUM_PHASES, num_layers))
    if not np.array_equal(counts.sum(axis=-1, dtype=np.int64), expected):
        raise ValueError(f"{prefix}counts is not tokens × active experts in each layer")
    columns = (counts, gate_mass, num_tokens, num_requests)
    types = (np.int64, np.float64, np.int64, np.int64)
    arrays: list[Any] = [column.astype(kind) for column, kind in zip(columns, types, strict=True)]
    if not count:
        return [Tally(*arrays)]
    return [Tally(*(np.asarray(array[index]) for array in arrays)) for index in range(*count)]


def _buckets(file: ArrayFile, grid: tuple[int, int], top_k: int) -> tuple[Bucket, ...]:
    if "bucket_ticks" not in file:
        return ()
    count = file.header("bucket_ticks")[1][0]
    ticks = file.read("bucket_ticks", (count, 2), "iu").astype(np.int64)
    # One after another: each ends after it begins, and begins no earlier than the one before it ends.
    least_steps = np.tile([1, 0], count)[:-1]
    if not ((ticks >= 0) & (ticks <= _MAX_COUNT)).all() or (np.diff(ticks.reshape(-1)) < least_steps).any():
        raise ValueError("bucket_ticks is no row of stretches of time")
    tallies = _tallies(file, "bucket_", (count,), grid, top_k)
    return tuple(Bucket(first, stop, tally) for (first, stop), tally in zip(ticks.tolist(), tallies, strict=True))


def _pairs(file: ArrayFile, grid: tuple[int, int], num_tokens: int) -> PairCounts | None:
    if "together" not in file:
        return None
    num_layers, num_experts = grid
    num_sampled = int(file.read("pair_tokens", (), "iu"))
    if not 0 <= num_sampled <= num_tokens:
        raise ValueError(f"pair_tokens is {num_sampled}, of {num_tokens} tokens")
    matrices = []
    for name, num_matrices in (("together", num_layers), ("onward", max(num_layers - 1, 0))):
        matrix = file.read(name, (num_matrices, num_experts, num_experts), "iu")
        if ((matrix < 0) | (matrix > num_sampled)).any():
            raise ValueError(f"{name} has pairs below zero, or more than sampled tokens")
        matrices.append(matrix.astype(np.int64))
    return PairCounts(num_sampled, *matrices)


def _is_time(value: Any) -> Any:
    """Whether Unix seconds, or an array of them, lie before the year 10000."""
    return (value >= 0) & (value < _LAST_TIME)
