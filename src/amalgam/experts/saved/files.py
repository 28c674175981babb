"""Saved sets as files: safetensors, and `.npz` for other programs and from before.

In and out: `SavedSet`, bytes, paths. What a file is, is told by its first bytes; what is written, by the ending of its
name.
"""

from __future__ import annotations

from pathlib import Path

from amalgam.base.files import replace_file
from amalgam.errors import AmalgamError, CheckpointError, describe
from amalgam.experts.saved.layout import MAX_BYTES, check_size, from_arrays, to_arrays
from amalgam.experts.saved.names import NPZ
from amalgam.experts.saved.npz import NpzFile, write_npz
from amalgam.experts.saved.safetensors import SafetensorsFile, header_sizes, write_safetensors
from amalgam.experts.saved.sets import SavedSet

_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # in a safetensors file, a header of 67 MB or more


def to_bytes(saved: SavedSet) -> bytes:
    """The content of a safetensors file.

    Raises:
        ConfigError: it has more labels than a reader takes.
    """
    text, arrays = to_arrays(saved)
    content = write_safetensors(arrays, {"meta": text})
    check_size(saved, "header", *header_sizes(content))
    return content


def to_npz(saved: SavedSet) -> bytes:
    """The content of an `.npz` file.

    Raises:
        ConfigError: it has more labels than a reader takes.
    """
    text, arrays = to_arrays(saved)
    # Compression would take seconds of a processor that has tokens to compute; a history is tens of megabytes.
    return write_npz(arrays, {"meta": text}, compress=not saved.buckets)


def save(saved: SavedSet, path: Path) -> None:
    """Write a file: `.npz` if its name ends so, else safetensors. It appears complete or not at all.

    Raises:
        OSError: it cannot be written.
        ConfigError: it has more labels than a reader takes.
    """
    replace_file(path, to_npz(saved) if path.suffix == NPZ else to_bytes(saved))


def from_bytes(content: bytes, where: str) -> SavedSet:
    """Read a file's content, either kind; `where` names it in messages.

    Raises:
        CheckpointError: it is no saved set, or damaged.
    """
    try:
        is_zip = content.startswith(_ZIP_MAGICS)
        return from_arrays(NpzFile(content, MAX_BYTES) if is_zip else SafetensorsFile(content))
    except Exception as error:  # the zip and JSON readers of the standard library raise a dozen kinds for a bad file
        reason = error.what if isinstance(error, AmalgamError) else str(error)
        raise CheckpointError(
            f"{where} is not a saved set of expert statistics ({type(error).__name__}: {describe(reason)}).",
            remedy="Save one with `amalgam experts --save FILE.safetensors`.",
        ) from None


def load(path: str | Path) -> SavedSet:
    """
    Raises:
        CheckpointError: there is no such file, or it is no saved set.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OSError(f"more than {MAX_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"Cannot read {str(path)!r}: {reason}.", remedy="Give the path of a saved set.") from None
    return from_bytes(content, repr(str(path)))
