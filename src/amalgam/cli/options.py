"""Flags that several verbs share: every setting as `--section.field`, and the everyday ones by short names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml

from amalgam.config import environment_name, load_settings, setting_keys
from amalgam.errors import ConfigError

SHORT = {"server.host": "--host", "server.port": "--port", "model.base_path": "--model"}
# Mappings have no flag of their own: --source and --map build them.
_STRUCTURED = ("sources", "weight_mapping", "rules", "derived")


def with_settings(function: Callable[..., Any] | None = None, *, needs_model: bool = True) -> Callable[..., Any]:
    """Give a verb `--config`, `--source`, `--map` and a flag for every setting; it receives `settings: Settings`.

    A verb that can do without a model sees an empty `model.base_path` when none is given.
    """
    if function is None:
        return functools.partial(with_settings, needs_model=needs_model)
    flags = {_parameter(key): key for key in setting_keys() if key.rpartition(".")[2] not in _STRUCTURED}

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> Any:
        config: Path | None = arguments.pop("config")
        overrides = {key: _value(arguments.pop(name)) for name, key in flags.items()}
        mixed = "model.mixed_precision"
        for item in arguments.pop("source"):
            name, path = _pair(item, "--source", "name=folder or name=hub-id")
            overrides[f"{mixed}.sources"] = {**overrides.get(f"{mixed}.sources", {}), name: path}
        rules = [_pair(item, "--map", "pattern=source") for item in arguments.pop("map_")]
        if rules:
            overrides[f"{mixed}.rules"] = [{"pattern": pattern, "source": source} for pattern, source in rules]
        if not needs_model and config is None and overrides["model.base_path"] is None:
            overrides["model.base_path"] = ""
        return function(settings=load_settings(config, overrides), **arguments)

    hints = {
        "config": Annotated[Path | None, typer.Option("--config", "-c", help="Configuration file (YAML).")],
        "source": Annotated[list[str], typer.Option("--source", help="Declare a source: NAME=FOLDER. Repeatable.")],
        "map_": Annotated[list[str], typer.Option("--map", help="Add a rule: PATTERN=SOURCE. Repeatable.")],
    }
    defaults: dict[str, Any] = {"config": None, "source": [], "map_": []}
    for name, key in flags.items():
        names = [*([SHORT[key]] if key in SHORT else []), f"--{key}"]
        help_text = f"{setting_keys()[key]} [{environment_name(key)}]"
        option = typer.Option(*names, help=help_text, rich_help_panel=f"Settings: {key.partition('.')[0]}")
        hints[name] = Annotated[str | None, option]
        defaults[name] = None
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "settings"]
    own_hints = get_type_hints(function, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=own_hints[p.name]) for p in own if p.kind is not keyword]
        + [p.replace(annotation=own_hints[p.name]) for p in own if p.kind is keyword]
        + [inspect.Parameter(n, keyword, default=defaults[n], annotation=hint) for n, hint in hints.items()]
    )
    wrapper.__annotations__ = {**{p.name: own_hints[p.name] for p in own}, **hints}
    return wrapper


def _parameter(key: str) -> str:
    return key.replace(".", "_")


def _value(text: str | None) -> Any:
    """A flag's text as YAML reads it: numbers, booleans, null."""
    if text is None:
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _pair(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise ConfigError(f"{flag} is {text!r}.", remedy=f"Expected {form}.")
    return name, value
