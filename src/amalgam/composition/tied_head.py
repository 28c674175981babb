"""Whether the head that a tied checkpoint stores nevertheless is its embedding."""

from __future__ import annotations

import torch

from amalgam.composition.likeness import compare
from amalgam.composition.rounding import rounding_of
from amalgam.composition.source import Source
from amalgam.errors import CheckpointError
from amalgam.formats.contract import StoredWeight
from amalgam.formats.fused import lines_of

CHUNK_BYTES, CHUNK_ROWS = 2**22, 1024


def check_tied_head(source: Source, embedding: str, head: str, *, may_be_rounded: bool) -> None:
    """Compare a head that a tied checkpoint stores nevertheless with its embedding, all of it.

    Args:
        may_be_rounded: the two may be one matrix in two precisions, as GGUF files have them.

    Raises:
        CheckpointError: they differ: either the head is one of its own and the config wrong, or the head is left over.
    """
    found = [source.weights[name] for name in (embedding, head) if name in source.weights]
    if len(found) < 2 or _have_same_values(source, *found):
        return
    if may_be_rounded:
        if _have_same_rounded_values(source, *found):
            return
        raise CheckpointError(
            f"The base checkpoint ties the head to the embedding, but {source.folder} has a {head!r} that differs from "
            f"its {embedding!r} by more than rounding.",
            remedy=f"Source {source.name!r} is of another model: take one that was made of the base checkpoint.",
        )
    raise CheckpointError(
        f"{source.config_place} ties the head to the embedding, but {source.folder} has a {head!r} of its own.",
        remedy="Set tie_word_embeddings to false in config.json if it is to be used, or remove the tensor.",
    )


def _have_same_values(source: Source, one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two weights are equal: byte by byte, or value by value where both are wide in different types."""
    if one.shape != other.shape or one.parts.keys() != other.parts.keys():
        return False
    if not (one.is_wide and other.is_wide) and one.format.name != other.format.name:
        return False
    for role in one.parts:
        pair = one.parts[role], other.parts[role]
        if pair[0].shape != pair[1].shape or (pair[0].dtype != pair[1].dtype and not one.is_wide):
            return False
        if not pair[0].shape:
            if not torch.equal(*(source.read(part) for part in pair)):
                return False
            continue
        lines = max(1, CHUNK_BYTES * pair[0].shape[0] // max(1, pair[0].nbytes))
        for start in range(0, pair[0].shape[0], lines):
            stop = min(start + lines, pair[0].shape[0])
            first, second = (source.read(lines_of(part, start, stop)) for part in pair)
            if first.dtype == second.dtype:
                is_same = torch.equal(*(part.contiguous().view(torch.uint8) for part in (first, second)))
            else:
                is_same = torch.equal(first.float(), second.float())
            if not is_same:
                return False
            for part in pair:
                source.release(lines_of(part, start, stop))
    return True


def _have_same_rounded_values(source: Source, one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two matrices are one, each rounded in its own way."""
    if one.shape != other.shape:
        return False
    for start in range(0, one.shape[0], CHUNK_ROWS):
        run = range(start, min(start + CHUNK_ROWS, one.shape[0]))
        values = [source.rows(stored, [run]) for stored in (one, other)]
        rounding = [rounding_of(stored, part) for stored, part in zip((one, other), values, strict=True)]
        if not compare(*values, *rounding).is_same:
            return False
    return True
