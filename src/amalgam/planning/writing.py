"""A choice as a configuration that `amalgam serve` takes.

In: a problem, a choice, settings. Out: YAML. Must never know: why the choice was made.

Most weights of a kind mostly come from one source: one pattern says that, and patterns for the experts of one layer say
what differs. They are longer in literal characters, so they win.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amalgam.base.files import replace_file, writing
from amalgam.composition.loader import ModelLoader
from amalgam.config.placement import BASE_SOURCE, build_rules
from amalgam.config.settings import Settings, build_settings
from amalgam.config.text import read_yaml
from amalgam.errors import ConfigError
from amalgam.planning.problem import Problem

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MIXED = "mixed_precision"


# What a rule says: a source's name, or `{source, device}`.
Said = str | dict[str, str]


def rules_of(
    loader: ModelLoader, problem: Problem, choice: Sequence[int], devices: Sequence[str] = (), primary: str = ""
) -> dict[str, Said]:
    """Pattern → source, or source and device; means exactly the choice, and base on the primary device for everything
    else.

    Args:
        devices: where each item lies; empty: nothing is said of devices.
        primary: the device of what no rule places.
    """
    exact = problem.mapping(choice)
    where = devices or [""] * len(problem.items)
    said, plain = {}, {}
    for item, device in zip(problem.items, where, strict=True):
        # Of experts alone: everything else lies on the primary device.
        said[item.name] = _Said(exact.get(item.name, BASE_SOURCE), "" if item.expert is None else device)
        plain[item.name] = _Said(BASE_SOURCE, "" if item.expert is None else primary)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for item in problem.items:
        by_kind[_NUMBER.sub("{}", item.name)].append(item.name)
    rules: dict[str, _Said] = {}
    for kind, names in by_kind.items():
        usual, _ = Counter(said[name] for name in names).most_common(1)[0]
        if usual != plain[names[0]]:
            rules[kind.replace("{}", "*")] = usual
        exceptions: dict[tuple[str, _Said], list[int]] = defaultdict(list)
        for name in names:
            if said[name] == usual:
                continue
            numbers = list(_NUMBER.finditer(name))
            if len(numbers) < 2:
                rules[name] = said[name]
                continue
            last = numbers[-1]
            exceptions[f"{name[: last.start()]}{{}}{name[last.end() :]}", said[name]].append(int(last[0]))
        for (pattern, what), ids in exceptions.items():
            listed = str(ids[0]) if len(ids) == 1 else f"{{{','.join(map(str, sorted(ids)))}}}"
            rules[pattern.replace("{}", listed)] = what
    found = loader.choose(build_rules({pattern: what.source for pattern, what in rules.items()}))
    same = all(found[name].source == exact.get(name, BASE_SOURCE) for name in loader.names)
    chosen = rules if same else {name: what for name, what in said.items() if what != plain[name]}
    return {pattern: what.written() for pattern, what in chosen.items()}


@dataclass(frozen=True)
class _Said:
    """Of one weight; device: empty: nothing. Where experts are placed, all of them name their device, the primary one
    too: a rule that is silent about it would leave that to a weaker rule."""

    source: str
    device: str

    def written(self) -> Said:
        return {"source": self.source, "device": self.device} if self.device else self.source


def write_config(
    out: Path,
    settings: Settings,
    rules: Mapping[str, Said],
    comments: Sequence[str],
    config: Path | None = None,
    *,
    devices: Mapping[str, int] | None = None,
    force: bool = False,
) -> None:
    """
    Args:
        devices: device → bytes that weights may take there, the one that computes all else first; None: as the
            settings say.
        comments: lines at the top: what was chosen and why.
        config: the file that the settings came from; its other sections are carried over.

    Raises:
        ConfigError: the file exists.
        CheckpointError: it cannot be written.
    """
    data: dict[str, Any] = read_yaml(config) if config is not None else {}
    mixed: dict[str, dict[str, Any]] = {
        "sources": dict(settings.model.mixed_precision.sources),
        "derived": {
            name: derived.model_dump(exclude_none=True)
            for name, derived in settings.model.mixed_precision.derived.items()
        },
        "weight_mapping": dict(rules),
    }
    used = {what if isinstance(what, str) else what["source"] for what in rules.values()}
    mixed["sources"] = {name: str(Path(path).expanduser()) for name, path in mixed["sources"].items() if name in used}
    mixed["derived"] = {name: derived for name, derived in mixed["derived"].items() if name in used}
    data["model"] = {
        "name": settings.model.name or Path(settings.model.base_path).name,
        "base_path": settings.model.base_path,
        _MIXED: {key: value for key, value in mixed.items() if value},
    }
    if devices is not None:
        placed = {"device_map": next(iter(devices)), "devices": {name: f"{size}B" for name, size in devices.items()}}
        data["inference"] = {**(data.get("inference") or {}), **placed}
    build_settings(data)
    text = "".join(f"# {line}\n" for line in comments)
    text += yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already.", remedy="Choose another name, or give --force.")
    with writing(out):
        replace_file(out, text)
