"""Sensitivities that were measured before, found and read.

In: a folder that `SensitivityStudy` wrote, a problem. Out: `Sensitivities`. Must never know: texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from amalgam.base.strict_json import parse_json
from amalgam.composition.loader import ModelLoader
from amalgam.errors import ConfigError
from amalgam.planning.problem import Problem
from amalgam.planning.sensitivity import (
    STUDY,
    Sensitivities,
    WeightErrors,
    digest_of_weights,
    errors_on_disk,
    file_of,
    layers_of,
)

_REMEDY = "Measure them: amalgam evaluate --sensitivity --config FILE --text FILE, with texts like the traffic."


def read_sensitivities(folder: Path, loader: ModelLoader, problem: Problem) -> Sensitivities:
    """
    Raises:
        ConfigError: the folder holds none, not those of these weights, or not of all layers.
    """
    found = _study(folder)
    if found is None:
        raise ConfigError(f"{folder} holds no sensitivities.", remedy=_REMEDY)
    num_tokens, digest = found
    if digest != digest_of_weights(loader, problem):
        raise ConfigError(f"The sensitivities in {folder} are of other weights or sources.", remedy=_REMEDY)
    weights: dict[str, WeightErrors] = {}
    for layer in layers_of(problem):
        errors = errors_on_disk(folder, layer, problem)
        if errors is None:
            raise ConfigError(f"{file_of(folder, layer)} is missing or damaged.", remedy=_REMEDY)
        weights.update(errors)
    return Sensitivities(num_tokens, weights, digest)


def find_sensitivities(root: Path, loader: ModelLoader, problem: Problem) -> Path:
    """The latest folder below `root` that is about these weights.

    Raises:
        ConfigError: there is none.
    """
    digest = digest_of_weights(loader, problem)
    matching = [folder for folder in _folders(root) if (found := _study(folder)) and found[1] == digest]
    if not matching:
        raise ConfigError(f"{root} holds no sensitivities of these weights and sources.", remedy=_REMEDY)
    return max(matching, key=lambda folder: (folder / STUDY).stat().st_mtime)


def _folders(root: Path) -> Iterator[Path]:
    return (file.parent for file in sorted(root.glob(f"*/{STUDY}")))


def _study(folder: Path) -> tuple[int, str] | None:
    """Tokens that were seen, and the digest of the weights."""
    try:
        document = parse_json((folder / STUDY).read_bytes())
        return int(document["num_tokens"]), str(document["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
