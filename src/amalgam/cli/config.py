"""`amalgam config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.config.keys import SettingInfo, all_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError


@with_settings(needs_model=False)
def command(
    settings: Settings,
    origins: Mapping[str, str],
    only: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only settings with this in their names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check a configuration, and show every setting: its value, its type, its default, and where the value comes from.

    The value is what the file, the environment and flags make of it together. `amalgam plan` checks the checkpoints.
    """
    shown = [info for info in all_settings() if not only or any(part in info.key for part in only)]
    if not shown:
        raise ConfigError(f"No setting has {' or '.join(map(repr, only or []))} in its name.", remedy="Leave it out.")
    rows = [_row(info, settings, origins) for info in shown]
    if as_json:
        from amalgam.cli.console import print_json

        print_json(rows)
    else:
        _print(rows)


def _row(info: SettingInfo, settings: Settings, origins: Mapping[str, str]) -> dict[str, Any]:
    value: Any = settings.model_dump(mode="json")
    for part in info.key.split("."):
        value = value[part]
    return {
        "setting": info.key,
        "value": value,
        "from": origins.get(info.key, "default"),
        "type": info.kind,
        "default": info.default,
        "is_required": info.is_required,
        "environment": info.environment,
        "meaning": info.description,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    import sys

    from rich.padding import Padding
    from rich.text import Text

    from amalgam.base.escaping import one_line
    from amalgam.cli.console import is_terminal, out, print_table

    texts = [
        (
            row["setting"],
            _text(row["value"]),
            row["from"],
            row["type"],
            "required" if row["is_required"] else _text(row["default"]),
            row["environment"],
            row["meaning"],
        )
        for row in rows
    ]
    if not is_terminal(sys.stdout):
        print_table(("setting", "value", "from", "type", "default", "environment", "meaning"), texts)
        return
    for key, value, origin, kind, default, variable, meaning in texts:
        line = Text(f"{key} = ", "bold").append(one_line(value), "not bold")
        out.print(line.append("" if origin == "default" else f"  ({one_line(origin)})", "not bold cyan"))
        facts = f"{kind}{',' if default == 'required' else ', default'} {default}; --{key}, {variable}"
        for text in (meaning, facts):
            out.print(Padding(Text(text, "dim"), (0, 0, 0, 4)))
        out.print()


def _text(value: Any) -> str:
    if value is None or value in ("", [], (), {}):
        return "none"
    if isinstance(value, str):
        return value
    import orjson

    return orjson.dumps(value).decode()
