"""Settings from where a user writes them.

In: a YAML file, `AMALGAM_*` environment variables and command-line overrides, in rising order of precedence. Out: one
immutable `Settings`, and where each of its values comes from. A text is read as what its field declares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amalgam.base.validation import kind_in_words
from amalgam.config.environment import NATIVE_ISA_VARIABLE
from amalgam.config.fields import can_be_empty
from amalgam.config.keys import all_settings, setting_keys
from amalgam.config.placement import PATH_SUFFIX
from amalgam.config.settings import Settings, build_settings
from amalgam.config.text import our_variables, read_yaml
from amalgam.errors import ConfigError

_MIXED = "model.mixed_precision"


def load_settings(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read settings from a YAML file, the environment and dotted overrides (`{"server.port": 80}`).

    Relative model paths in the file are taken from the file's folder; all other paths from the working directory. `~`
    is the home folder in all of them. An override holds whatever its value is: None undoes what the file says.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds unknown or invalid keys.
    """
    return read_settings(path, overrides, environ=environ).settings


@dataclass(frozen=True)
class ReadSettings:
    """Settings, and where those come from that are not left at their defaults: `file`, a variable's name, `flag`."""

    settings: Settings
    origins: Mapping[str, str]


def read_settings(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    rules: Sequence[Mapping[str, str]] = (),
    devices: Mapping[str, str] | None = None,
    needs_model: bool = True,
    environ: Mapping[str, str] | None = None,
) -> ReadSettings:
    """The same as `load_settings`, and more.

    Args:
        sources: are declared beside those of the file and in place of those that have the same names there.
        rules: come after those of the file.
        devices: memory by name, beside and in place of those of the file.
        needs_model: False leaves `model.base_path` empty where nobody gives it.
    """
    data: dict[str, Any] = {}
    if path is not None:
        file = Path(path).expanduser()
        data = read_yaml(file)
        _anchor_paths(data, file.resolve().parent)
    origins = {key: "file" for key in setting_keys() if _is_set(data, key)}
    for name, (key, value) in _from_environment(os.environ if environ is None else environ).items():
        _set(data, key, value)
        origins[key] = name
    for key, value in (overrides or {}).items():
        _set(data, key, value)
        origins[key] = "flag"
    if sources:
        mixed = _section(data, _MIXED)
        for name in sources:
            mixed.pop(name + PATH_SUFFIX, None)
        mixed["sources"] = {**(mixed.get("sources") or {}), **sources}
        origins[f"{_MIXED}.sources"] = "flag"
    if rules:
        mixed = _section(data, _MIXED)
        mixed["rules"] = [*(mixed.get("rules") or ()), *rules]
        origins[f"{_MIXED}.rules"] = "flag"
    if devices:
        inference = _section(data, "inference")
        inference["devices"] = {**(inference.get("devices") or {}), **devices}
        origins["inference.devices"] = "flag"
    if not needs_model:
        _section(data, "model").setdefault("base_path", "")
    return ReadSettings(build_settings(data, origins), origins)


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make the file's relative model paths absolute where they exist or look like paths; hub ids stay as they are."""

    def anchor(value: Any) -> Any:
        if not isinstance(value, str) or not value or os.path.isabs(os.path.expanduser(value)):
            return value
        candidate = folder / value
        looks_like_path = value.startswith(".") or value.count("/") != 1
        return os.path.normpath(candidate) if looks_like_path or candidate.exists() else value

    speculation = data.get("speculation")
    if isinstance(speculation, dict) and "draft" in speculation:
        speculation["draft"] = anchor(speculation["draft"])
    model = data.get("model")
    if not isinstance(model, dict):
        return
    if "base_path" in model:
        model["base_path"] = anchor(model["base_path"])
    mixed = model.get("mixed_precision")
    if isinstance(mixed, dict):
        for key in mixed:
            if isinstance(key, str) and key.endswith(PATH_SUFFIX):
                mixed[key] = anchor(mixed[key])
        if isinstance(mixed.get("sources"), dict):
            mixed["sources"] = {name: anchor(value) for name, value in mixed["sources"].items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Variable → key and value. An empty one says none where a setting can be empty, and nothing otherwise."""
    known = {info.environment: info for info in all_settings()}
    values: dict[str, tuple[str, Any]] = {}
    for name, text in our_variables(environ, {*known, NATIVE_ISA_VARIABLE}).items():
        if name == NATIVE_ISA_VARIABLE:
            continue
        info = known[name]
        if text:
            values[name] = info.key, info.read(text)
        elif can_be_empty(info.field):
            values[name] = info.key, None
    return values


def _section(data: dict[str, Any], dotted: str) -> dict[str, Any]:
    """The mapping at a dotted key, made if absent."""
    for part in dotted.split("."):
        child = data.get(part)
        child = data[part] = {} if child is None else child
        if not isinstance(child, dict):
            raise ConfigError(f"{part} is {kind_in_words(child)}.", remedy="Expected a mapping.")
        data = child
    return data


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    parent, _, last = dotted.rpartition(".")
    _section(data, parent)[last] = value


def _is_set(data: Any, dotted: str) -> bool:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.get(parent) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        return False
    return last in data or (dotted == f"{_MIXED}.sources" and any(str(key).endswith(PATH_SUFFIX) for key in data))
