"""Two plans beside each other: which weights come from another source, in another format, and what that takes.

In: provenance manifests, of configurations, files or running servers. Out: `PlanDifference`. Reads no weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amalgam.base.strict_json import parse_json
from amalgam.composition.loader import ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.composition.progress import Progress
from amalgam.config.reading import load_settings
from amalgam.errors import ConfigError, describe
from amalgam.runtime.derive import ensure_derived

MAX_MANIFEST_BYTES = 2**30


@dataclass(frozen=True)
class ChangedWeight:
    """A weight that both plans have, from other bytes, in another format or on another device.

    Attributes:
        device_before, device_after: None: with the rest of the model.
    """

    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int  # as stored
    bytes_after: int
    device_before: str | None = None
    device_after: str | None = None


# Source, format and device, each before and after.
Group = tuple[str, str, str, str, str | None, str | None]


@dataclass(frozen=True)
class PlanDifference:
    """What the second of two plans has otherwise than the first.

    Attributes:
        only_before, only_after: weights that one of them does not have: they are of different models.
        bytes_before, bytes_after: of all weights, as they are stored.
    """

    fingerprint_before: str
    fingerprint_after: str
    num_weights: int
    changed: list[ChangedWeight]
    only_before: list[str]
    only_after: list[str]
    bytes_before: int
    bytes_after: int

    @property
    def groups(self) -> dict[Group, list[ChangedWeight]]:
        """The changed weights by what they were and are, the largest group first."""
        found: dict[Group, list[ChangedWeight]] = defaultdict(list)
        for weight in self.changed:
            sources, formats = (weight.source_before, weight.source_after), (weight.format_before, weight.format_after)
            found[*sources, *formats, weight.device_before, weight.device_after].append(weight)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def as_json(self) -> dict[str, Any]:
        """A JSON object of all attributes."""
        return asdict(self)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> PlanDifference:
    """
    Args:
        before, after: manifests, as `read_plan` gives them.
    """
    first, second = ({weight["name"]: weight for weight in plan["weights"]} for plan in (before, after))
    changed = [
        ChangedWeight(
            name,
            old["source"],
            new["source"],
            old["format"],
            new["format"],
            _stored_bytes(old),
            _stored_bytes(new),
            old["device"],
            new["device"],
        )
        for name, old in first.items()
        if (new := second.get(name)) is not None and _identity(old) != _identity(new)
    ]
    return PlanDifference(
        before["fingerprint"],
        after["fingerprint"],
        len(second),
        changed,
        [name for name in first if name not in second],
        [name for name in second if name not in first],
        sum(map(_stored_bytes, first.values())),
        sum(map(_stored_bytes, second.values())),
    )


def read_plan(place: str, progress: Progress | None = None) -> dict[str, Any]:
    """The manifest of a plan.

    Args:
        place: a configuration (YAML), whose derived sources are made if they are missing, or a manifest that was kept
            (.json, of `GET /manifest` or `amalgam plan --manifest`).

    Raises:
        AmalgamError: there is no such file, or it holds no plan.
    """
    path = Path(place).expanduser()
    if path.suffix.lower() == ".json":
        return read_manifest(path)
    settings = load_settings(path)
    ensure_derived(settings, progress)
    loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), settings.engine.num_load_threads)
    return plan_manifest(loader.plan())


def read_manifest(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: there is no such file, or it is no manifest.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("it is too large")
        return checked_manifest(parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{describe(str(path))} is no manifest: {reason}.", remedy="Make one: amalgam plan --manifest > FILE.json."
        ) from None


def checked_manifest(document: Any) -> dict[str, Any]:
    """What this module reads of a manifest; other fields are left out.

    Raises:
        ValueError: it is none.
    """
    try:
        weights = [
            {
                "name": _text(weight, "name"),
                "source": _text(weight, "source"),
                "format": _text(weight, "format"),
                "device": None if weight.get("device") is None else _text(weight, "device"),
                "parts": [
                    {
                        "tensor": _text(part, "tensor"),
                        "file": _text(part, "file"),
                        "offset": part["offset"],
                        "nbytes": _size(part, "nbytes"),
                    }
                    for part in weight["parts"]
                ],
            }
            for weight in document["weights"]
        ]
        fingerprint = _text(document, "fingerprint")
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    except TypeError:
        raise ValueError("it is no object of lists of objects") from None
    name, count = next(iter(Counter(weight["name"] for weight in weights).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"the weight {describe(name)} stands {count} times")
    return {"fingerprint": fingerprint, "weights": weights}


def _text(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(value := fields[name], str):
        raise ValueError(f"{name} is {describe(value)}")
    return value


def _size(fields: Mapping[str, Any], name: str) -> int:
    if type(value := fields[name]) is not int or value < 0:
        raise ValueError(f"{name} is {describe(value)}")
    return value


def _identity(weight: Mapping[str, Any]) -> tuple[Any, ...]:
    parts = ((part["file"], part["tensor"], part["offset"], part["nbytes"]) for part in weight["parts"])
    return (weight["format"], weight["device"], *parts)


def _stored_bytes(weight: Mapping[str, Any]) -> int:
    return sum(part["nbytes"] for part in weight["parts"])
