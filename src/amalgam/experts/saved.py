"""Saved sets: the statistics of some traffic as one `.npz` file, to compare, to merge, or to go on from.

In and out: `SavedSet`, bytes and files. Must never know: the tracker.

Layout of the file (numpy arrays, never pickled), version 1:

    meta              uint8: JSON {version, model, layer_ids, num_experts, num_active_experts, start, end, labels}
    counts, gate_mass, num_tokens, num_requests            the `Tally` of everything
    label_counts, label_gate_mass, label_num_tokens, label_num_requests    the same with a leading axis, one per label
    last_activation   float64 [layers, experts], Unix seconds, NaN: never
    pair_tokens, together, onward                          the `PairCounts`; absent where none were kept
    bucket_ticks, bucket_counts, …                         the history, only in a file that a server goes on from
"""

from __future__ import annotations

import io
import json
import math
import re
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.errors import CheckpointError, ConfigError, RequestError, describe
from amalgam.experts.history import NUM_PHASES, Bucket, Tally
from amalgam.experts.labels import MAX_LABEL_CHARS
from amalgam.experts.pairs import PairCounts

_VERSION = 1
_MAX_FILE_BYTES = 2**31
_MAX_META_BYTES = 2**20
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TALLY_FIELDS = ("counts", "gate_mass", "num_tokens", "num_requests")
_SUFFIX = ".npz"
_DAMAGE = (ValueError, LookupError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RecursionError)


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

    def check_fits(self, layer_ids: Sequence[int], num_experts: int, where: str) -> None:
        """
        Raises:
            ConfigError: these are the statistics of another model.
        """
        if (self.layer_ids, self.num_experts) != (tuple(layer_ids), num_experts):
            raise ConfigError(
                f"{where} holds {len(self.layer_ids)} layers of {self.num_experts} experts, and this model has "
                f"{len(layer_ids)} of {num_experts}.",
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
        item.check_fits(first.layer_ids, first.num_experts, f"The set of {item.model!r}")
        total.add(item.total)
        last = np.fmax(last, item.last_activation)
        for label, tally in item.labels.items():
            labels.setdefault(label, Tally.zeros(*grid)).add(tally)
        if item.pairs is not None:
            pairs = _add_pairs(pairs, item.pairs)
    start, end = min(item.start for item in sets), max(item.end for item in sets)
    return replace(
        first, start=start, end=end, total=total, last_activation=last, labels=labels, pairs=pairs, buckets=()
    )


def to_bytes(saved: SavedSet) -> bytes:
    """The file's content."""
    meta = {
        "version": _VERSION,
        "model": saved.model,
        "layer_ids": saved.layer_ids,
        "num_experts": saved.num_experts,
        "num_active_experts": saved.num_active_experts,
        "start": saved.start,
        "end": saved.end,
        "labels": list(saved.labels),
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
    except _DAMAGE as error:
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
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise OSError(f"more than {_MAX_FILE_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"Cannot read {str(path)!r}: {reason}.", remedy="Give the path of a saved set.") from None
    return from_bytes(content, repr(str(path)))


def check_name(name: str) -> str:
    """A saved set's name, which is its file's name without `.npz`.

    Raises:
        RequestError: not a plain name.
    """
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
        raise RequestError(
            f"name is {describe(name)}.", remedy="Use a letter or digit, then letters, digits, . _ and -; at most 200."
        )
    return name.removesuffix(_SUFFIX)


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
    return sorted(path.stem for path in paths if _SAFE_NAME.fullmatch(path.name) and is_plain_file(path))


def is_plain_file(path: Path) -> bool:
    """A link might lead out of the folder."""
    return path.is_file() and not path.is_symlink()


def write_file(folder: str | Path, name: str, content: str | bytes) -> Path:
    """Write `content` to the file `name` in `folder`, which is made if absent, and return its path.

    The file appears complete or not at all. It never lies outside `folder`: a symbolic link of that name is replaced,
    not followed.

    Raises:
        RequestError: `name` is not a plain file name.
        ConfigError: the folder cannot be written to.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise RequestError(f"File name {describe(name)} is not a plain name.", remedy="Use letters, digits, . _ and -.")
    try:
        return replace_file(Path(folder) / name, content)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the export folder {str(folder)!r}: {error.strerror}.",
            remedy="Set server.export_dir to a folder that can be written to.",
        ) from None


def replace_file(target: Path, content: str | bytes) -> Path:
    """Write a file that appears complete or not at all; its folder is made if absent.

    Raises:
        OSError: it cannot be written.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _add_pairs(first: PairCounts | None, second: PairCounts) -> PairCounts:
    if first is None:
        return second
    return PairCounts(
        first.num_tokens + second.num_tokens, first.together + second.together, first.onward + second.onward
    )


def _stacked(name: str, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.stack(arrays)} if arrays else {}


def _parse(content: bytes) -> SavedSet:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # what the file claims to hold, before any of it is unpacked
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    if sum(sizes.values()) > _MAX_FILE_BYTES or sizes["meta.npy"] > _MAX_META_BYTES:
        raise ValueError("it unpacks to too many bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        meta = json.loads(arrays["meta"].tobytes())
        if not isinstance(meta, dict) or meta["version"] != _VERSION:
            raise ValueError("its version is unknown")
        layer_ids = tuple(_whole(value) for value in meta["layer_ids"])
        num_experts, labels = _whole(meta["num_experts"]), meta["labels"]
        if not isinstance(meta["model"], str) or not isinstance(labels, list):
            raise ValueError("meta is malformed")
        if not all(isinstance(label, str) and 0 < len(label) <= MAX_LABEL_CHARS for label in labels):
            raise ValueError("a label is malformed")
        grid = (len(layer_ids), num_experts)
        ticks = arrays["bucket_ticks"] if "bucket_ticks" in arrays else np.zeros((0, 2), np.int64)
        _check(ticks, (len(ticks), 2))
        label_tallies = _tallies(arrays, "label_", len(labels), grid)
        bucket_tallies = _tallies(arrays, "bucket_", len(ticks), grid)
        start, end = float(meta["start"]), float(meta["end"])
        if not math.isfinite(start) or not math.isfinite(end) or start > end:
            raise ValueError("its times are impossible")
        return SavedSet(
            model=meta["model"],
            layer_ids=layer_ids,
            num_experts=num_experts,
            num_active_experts=_whole(meta["num_active_experts"]),
            start=start,
            end=end,
            total=_tally([arrays[name] for name in _TALLY_FIELDS], grid),
            last_activation=_check(arrays["last_activation"], grid).astype(np.float64),
            labels=dict(zip(labels, label_tallies, strict=True)),
            pairs=_pairs(arrays, grid),
            buckets=tuple(
                Bucket(first, stop, tally) for (first, stop), tally in zip(ticks.tolist(), bucket_tallies, strict=True)
            ),
        )


def _tallies(arrays: Any, prefix: str, count: int, grid: tuple[int, int]) -> list[Tally]:
    if not count:
        return []
    columns = [arrays[prefix + name] for name in _TALLY_FIELDS]
    return [_tally([column[index] for column in columns], grid) for index in range(count)]


def _tally(columns: Sequence[npt.NDArray[Any]], grid: tuple[int, int]) -> Tally:
    counts, gate_mass, num_tokens, num_requests = columns
    if (counts < 0).any() or not np.isfinite(gate_mass).all():
        raise ValueError("its counts are impossible")
    return Tally(
        _check(counts, (NUM_PHASES, *grid)).astype(np.int64),
        _check(gate_mass, (NUM_PHASES, *grid)).astype(np.float64),
        _check(num_tokens, (NUM_PHASES,)).astype(np.int64),
        _check(num_requests, ()).astype(np.int64),
    )


def _pairs(arrays: Any, grid: tuple[int, int]) -> PairCounts | None:
    if "together" not in arrays:
        return None
    num_layers, num_experts = grid
    together = _check(arrays["together"], (num_layers, num_experts, num_experts)).astype(np.int64)
    onward = _check(arrays["onward"], (max(num_layers - 1, 0), num_experts, num_experts)).astype(np.int64)
    return PairCounts(int(_check(arrays["pair_tokens"], ())), together, onward)


def _check(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.shape != shape or array.dtype.kind not in "iuf":
        raise ValueError(f"an array has shape {array.shape} and type {array.dtype}, not {shape}")
    return array


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{describe(value)} is not a whole number")
    return value
