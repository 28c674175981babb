"""Saved sets: the statistics of some traffic as one `.npz` file, to compare, to merge, or to go on from.

In and out: `SavedSet`, bytes and files. Must never know: the tracker.

Layout of the file (numpy arrays, never pickled), version 1:

    meta              uint8: JSON {version, model, layer_ids, num_experts, num_active_experts, start, end, labels,
                      tick_seconds: what a tick of the history takes; old files lack it}
    counts, gate_mass, num_tokens, num_requests            the `Tally` of everything
    label_counts, label_gate_mass, label_num_tokens, label_num_requests    the same with a leading axis, one per label
    last_activation   float64 [layers, experts], Unix seconds, NaN: never
    pair_tokens, together, onward                          the `PairCounts`; absent where none were kept
    bucket_ticks, bucket_counts, …                         the history, only in a file that a server goes on from
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.base.files import replace_file
from amalgam.base.strict_json import parse_json
from amalgam.errors import CheckpointError, ConfigError, RequestError, describe
from amalgam.experts.history import NUM_PHASES, Bucket, Tally
from amalgam.experts.labels import check_label
from amalgam.experts.npz import ArrayFile
from amalgam.experts.pairs import PairCounts

_VERSION = 1
_MAX_BYTES = 2**31  # of the file, and of what it unpacks to
_MAX_META_BYTES = 2**20
_MAX_LAYERS, _MAX_EXPERTS = 1024, 65536  # as of a model
_MAX_MODEL_CHARS = 1024
_MAX_COUNT = 2**46  # nothing counts so far, and a layer's sum stays within int64
_LAST_TIME = 253_402_300_800.0  # the year 10000, Unix seconds
_MAX_NAME_CHARS = 200  # of a set
_MAX_FILES = 1000  # in the export folder; a client could fill the disk
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TALLY_FIELDS = ("counts", "gate_mass", "num_tokens", "num_requests")
_SUFFIX = ".npz"


@dataclass(frozen=True)
class SavedSet:
    """The statistics of some traffic. Times in Unix seconds."""

    model: str
    layer_ids: tuple[int, ...]
    num_experts: int
    num_active_experts: int
    start: float
    end: float
    total: Tally
    last_activation: npt.NDArray[np.float64]  # [layers, experts]
    labels: dict[str, Tally] = field(default_factory=dict)
    pairs: PairCounts | None = None
    buckets: tuple[Bucket, ...] = ()
    tick_seconds: float | None = None  # None: a file of before it was written down

    def check_fits(
        self, layer_ids: Sequence[int], num_experts: int, where: str, num_active_experts: int | None = None
    ) -> None:
        """
        Args:
            num_active_experts: None where only shares are compared.

        Raises:
            ConfigError: these are the statistics of another model.
        """
        if (self.layer_ids, self.num_experts) != (tuple(layer_ids), num_experts):
            raise ConfigError(
                f"{where} holds {len(self.layer_ids)} layers of {self.num_experts} experts, and this model has "
                f"{len(layer_ids)} of {num_experts}.",
                remedy="Use statistics of the same model.",
            )
        if num_active_experts not in (None, self.num_active_experts):
            raise ConfigError(
                f"{where} was counted with {self.num_active_experts} active experts per token, and this model has "
                f"{num_active_experts}.",
                remedy="Use statistics of the same model.",
            )


def merge(sets: Sequence[SavedSet]) -> SavedSet:
    """The traffic of all sets together.

    Raises:
        ConfigError: they are not of the same model.
    """
    first = sets[0]
    grid = len(first.layer_ids), first.num_experts
    total, pairs = Tally.zeros(*grid), None
    labels: dict[str, Tally] = {}
    last = np.full_like(first.last_activation, np.nan)
    for item in sets:
        item.check_fits(first.layer_ids, first.num_experts, f"The set of {item.model!r}", first.num_active_experts)
        total.add(item.total)
        last = np.fmax(last, item.last_activation)
        for label, tally in item.labels.items():
            labels.setdefault(label, Tally.zeros(*grid)).add(tally)
        if item.pairs is not None:
            pairs = _add_pairs(pairs, item.pairs)
    start, end = min(item.start for item in sets), max(item.end for item in sets)
    return replace(
        first,
        start=start,
        end=end,
        total=total,
        last_activation=last,
        labels=labels,
        pairs=pairs,
        buckets=(),
        tick_seconds=None,
    )


def to_bytes(saved: SavedSet) -> bytes:
    """The file's content."""
    meta = {
        "version": _VERSION,
        "model": "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in saved.model),
        "layer_ids": saved.layer_ids,
        "num_experts": saved.num_experts,
        "num_active_experts": saved.num_active_experts,
        "start": saved.start,
        "end": saved.end,
        "labels": list(saved.labels),
        "tick_seconds": saved.tick_seconds,
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        "last_activation": saved.last_activation,
    }
    for name in _TALLY_FIELDS:
        arrays[name] = getattr(saved.total, name)
        arrays |= _stacked(f"label_{name}", [getattr(tally, name) for tally in saved.labels.values()])
        arrays |= _stacked(f"bucket_{name}", [getattr(bucket.tally, name) for bucket in saved.buckets])
    if saved.buckets:
        arrays["bucket_ticks"] = np.array([(bucket.first, bucket.stop) for bucket in saved.buckets], np.int64)
    if saved.pairs is not None:
        arrays["pair_tokens"] = np.array(saved.pairs.num_tokens, np.int64)
        arrays |= {"together": saved.pairs.together, "onward": saved.pairs.onward}
    buffer = io.BytesIO()
    # Compression would take seconds of a processor that has tokens to compute; a history is tens of megabytes.
    save = np.savez if saved.buckets else np.savez_compressed
    save(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def from_bytes(content: bytes, where: str) -> SavedSet:
    """Read a file's content; `where` names it in messages.

    Raises:
        CheckpointError: it is no saved set, or damaged.
    """
    try:
        return _parse(content)
    except Exception as error:  # the zip and JSON readers of the standard library raise a dozen kinds for a bad file
        raise CheckpointError(
            f"{where} is not a saved set of expert statistics ({type(error).__name__}: {describe(str(error))}).",
            remedy="Save one with `amalgam experts --save FILE.npz`.",
        ) from None


def load(path: str | Path) -> SavedSet:
    """
    Raises:
        CheckpointError: there is no such file, or it is no saved set.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise OSError(f"more than {_MAX_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"Cannot read {str(path)!r}: {reason}.", remedy="Give the path of a saved set.") from None
    return from_bytes(content, repr(str(path)))


def check_name(name: str) -> str:
    """A saved set's name, which is its file's name without `.npz`; the file's name is taken too.

    Raises:
        RequestError: not a plain name.
    """
    if isinstance(name, str) and _is_name(short := name.removesuffix(_SUFFIX)):
        return short
    raise RequestError(
        f"name is {describe(name)}.",
        remedy=f"Use a letter or digit, then letters, digits, . _ and -; at most {_MAX_NAME_CHARS}, and not {_SUFFIX} "
        "twice.",
    )


def named_path(folder: str | Path, name: str) -> Path:
    """Where the set of that name lies.

    Raises:
        RequestError: not a plain name.
    """
    return Path(folder) / (check_name(name) + _SUFFIX)


def load_named(folder: str | Path, name: str) -> SavedSet:
    """
    Raises:
        RequestError: there is no set of that name in `folder`.
        CheckpointError: it is damaged.
    """
    path = named_path(folder, name)
    if not is_plain_file(path):
        known = ", ".join(list_names(folder)[:20]) or "none yet"
        raise RequestError(f"There is no saved set {describe(name)}.", remedy=f"Saved sets: {known}.")
    return load(path)


def list_names(folder: str | Path) -> list[str]:
    """The saved sets in a folder, by name."""
    paths = Path(folder).glob(f"*{_SUFFIX}")
    return sorted(path.stem for path in paths if _is_name(path.stem) and is_plain_file(path))


def is_plain_file(path: Path) -> bool:
    """A link might lead out of the folder."""
    return path.is_file() and not path.is_symlink()


def write_file(folder: str | Path, name: str, content: str | bytes) -> Path:
    """Write `content` to the file `name` in `folder`, which is made if absent, and return its path.

    The file appears complete or not at all. It never lies outside `folder`: a symbolic link of that name is replaced,
    not followed.

    Raises:
        RequestError: `name` is not a plain file name.
        ConfigError: the folder cannot be written to, or is full.
    """
    if not _SAFE_NAME.fullmatch(name) or len(name) > _MAX_NAME_CHARS + len(_SUFFIX):
        raise RequestError(f"File name {describe(name)} is not a plain name.", remedy="Use letters, digits, . _ and -.")
    target = Path(folder) / name
    try:
        if not target.exists() and _num_files(target.parent) >= _MAX_FILES:
            raise ConfigError(
                f"The export folder {str(folder)!r} holds {_MAX_FILES} files, the most that are kept there.",
                remedy="Remove those that are not needed, or set server.export_dir to another folder.",
            )
        return replace_file(target, content)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the export folder {str(folder)!r}: {error.strerror}.",
            remedy="Set server.export_dir to a folder that can be written to.",
        ) from None


def _is_name(text: str) -> bool:
    # A name that ends as files do would name two files: its own, and the one without the second ending.
    return len(text) <= _MAX_NAME_CHARS and not text.endswith(_SUFFIX) and _SAFE_NAME.fullmatch(text) is not None


def _num_files(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def _add_pairs(first: PairCounts | None, second: PairCounts) -> PairCounts:
    if first is None:
        return second
    return PairCounts(
        first.num_tokens + second.num_tokens, first.together + second.together, first.onward + second.onward
    )


def _stacked(name: str, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.stack(arrays)} if arrays else {}


def _parse(content: bytes) -> SavedSet:
    file = ArrayFile(content, _MAX_BYTES)
    [num_meta_bytes] = file.shape("meta")
    if num_meta_bytes > _MAX_META_BYTES:
        raise ValueError(f"meta takes {num_meta_bytes} bytes")
    meta = parse_json(file.read("meta", (num_meta_bytes,), "u").tobytes())
    if not isinstance(meta, dict) or meta["version"] != _VERSION:
        raise ValueError("its version is unknown")
    layer_ids = tuple(_whole("layer_ids", value, _MAX_LAYERS) for value in _list(meta, "layer_ids"))
    if len(layer_ids) > _MAX_LAYERS or list(layer_ids) != sorted(set(layer_ids)):
        raise ValueError(f"layer_ids is {describe(layer_ids)}")
    num_experts = _whole("num_experts", meta["num_experts"], _MAX_EXPERTS)
    top_k = _whole("num_active_experts", meta["num_active_experts"], num_experts)
    model, labels = meta["model"], _list(meta, "labels")
    if not isinstance(model, str) or len(model) > _MAX_MODEL_CHARS or not model.isprintable():
        raise ValueError(f"model is {describe(model)}")
    for label in labels:
        check_label(label)
    if len(set(labels)) != len(labels):
        raise ValueError("a label is there twice")
    start, end = _time(meta, "start"), _time(meta, "end")
    if start > end:
        raise ValueError(f"it ends at {end}, before its start at {start}")
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
        tick_seconds=_tick_seconds(meta),
    )


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
    count = file.shape("bucket_ticks")[0]
    ticks = file.read("bucket_ticks", (count, 2), "i")
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


def _list(meta: dict[str, Any], name: str) -> list[Any]:
    value = meta[name]
    if not isinstance(value, list):
        raise ValueError(f"{name} is {describe(value)}, which is no list")
    return value


def _whole(name: str, value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ValueError(f"{name} has {describe(value)}, which is no whole number up to {limit}")
    return value


def _time(meta: dict[str, Any], name: str) -> float:
    value = meta[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_time(value):
        raise ValueError(f"{name} is {describe(value)}, which is no time")
    return float(value)


def _tick_seconds(meta: dict[str, Any]) -> float | None:
    value = meta.get("tick_seconds")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LAST_TIME:
        raise ValueError(f"tick_seconds is {describe(value)}")
    return float(value)


def _is_time(value: Any) -> Any:
    """Whether Unix seconds, or an array of them, lie before the year 10000."""
    return (value >= 0) & (value < _LAST_TIME)
