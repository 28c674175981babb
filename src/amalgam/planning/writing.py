"""A choice as a configuration that `amalgam serve` takes.

In: a problem, a choice, settings. Out: YAML. Must never know: why the choice was made.

Most weights of a kind mostly come from one source: one pattern says that, and patterns for the experts of one layer say
what differs. They are longer in literal characters, so they win.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from amalgam.base.files import replace_file
from amalgam.composition.loader import ModelLoader
from amalgam.config.settings import BASE_SOURCE, Settings, build_rules, build_settings
from amalgam.config.text import read_yaml
from amalgam.errors import ConfigError
from amalgam.planning.problem import Problem

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MIXED = "mixed_precision"


def rules_of(loader: ModelLoader, problem: Problem, choice: Sequence[int]) -> dict[str, str]:
    """Pattern → source; means exactly the choice, and base for everything else."""
    exact = problem.mapping(choice)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for item in problem.items:
        by_kind[_NUMBER.sub("{}", item.name)].append(item.name)
    rules: dict[str, str] = {}
    for kind, names in by_kind.items():
        sources = {name: exact.get(name, BASE_SOURCE) for name in names}
        usual, _ = Counter(sources.values()).most_common(1)[0]
        if usual != BASE_SOURCE:
            rules[kind.replace("{}", "*")] = usual
        exceptions: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name, source in sources.items():
            if source == usual:
                continue
            numbers = list(_NUMBER.finditer(name))
            if len(numbers) < 2:
                rules[name] = source
                continue
            last = numbers[-1]
            exceptions[f"{name[: last.start()]}{{}}{name[last.end() :]}", source].append(int(last[0]))
        for (pattern, source), ids in exceptions.items():
            listed = str(ids[0]) if len(ids) == 1 else f"{{{','.join(map(str, sorted(ids)))}}}"
            rules[pattern.replace("{}", listed)] = source
    found = loader.choose(build_rules(rules))
    same = all(found[name].source == exact.get(name, BASE_SOURCE) for name in loader.names)
    return rules if same else exact


def write_config(
    out: Path,
    settings: Settings,
    rules: Mapping[str, str],
    comments: Sequence[str],
    config: Path | None = None,
    *,
    force: bool = False,
) -> None:
    """
    Args:
        comments: lines at the top: what was chosen and why.
        config: the file that the settings came from; its other sections are carried over.

    Raises:
        ConfigError: the file exists, or cannot be written.
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
    used = set(rules.values())
    mixed["sources"] = {name: str(Path(path).expanduser()) for name, path in mixed["sources"].items() if name in used}
    mixed["derived"] = {name: derived for name, derived in mixed["derived"].items() if name in used}
    data["model"] = {
        "name": settings.model.name or Path(settings.model.base_path).name,
        "base_path": settings.model.base_path,
        _MIXED: {key: value for key, value in mixed.items() if value},
    }
    build_settings(data)
    text = "".join(f"# {line}\n" for line in comments)
    text += yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already.", remedy="Choose another name, or give --force.")
    try:
        replace_file(out, text)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}).", remedy="Check its folder and its name.") from error
