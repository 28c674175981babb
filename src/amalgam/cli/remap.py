"""`amalgam remap`."""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.address import DEFAULT_URL, AdminKey, Url
from amalgam.errors import AmalgamError, CancelledError, ConfigError, PlanError, UnavailableError

if TYPE_CHECKING:
    from amalgam.cli.server import Server

_CHANGE, _KEEP, _LOOK = "What is changed", "What is kept", "Instead of a change"


def command(
    rules: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATTERN=SOURCE]...", help="Where weights come from: names or patterns, and a source."),
    ] = None,
    url: Url = DEFAULT_URL,
    key: AdminKey = "",
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Remove the rule of this pattern. Repeatable.", rich_help_panel=_CHANGE),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Take the whole set of rules of a configuration.", rich_help_panel=_CHANGE),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Take the files as they are now.", rich_help_panel=_CHANGE)
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to the version before.", rich_help_panel=_CHANGE)
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Go back to this version, or named plan.", rich_help_panel=_CHANGE),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Leave the current version and give the new one this name, which requests can ask for.",
            rich_help_panel=_CHANGE,
        ),
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Keep a version in memory, by number or name.", rich_help_panel=_KEEP),
    ] = None,
    unpin: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Keep it no longer.", rich_help_panel=_KEEP)
    ] = None,
    unname: Annotated[str | None, typer.Option(metavar="NAME", help="Take a name away.", rich_help_panel=_KEEP)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would change, and change nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Begin, and do not wait for the end.")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="List the versions in memory.", rich_help_panel=_LOOK)
    ] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="BEFORE AFTER", help="Tell in what two versions differ.", rich_help_panel=_LOOK),
    ] = None,
    list_changes: Annotated[
        bool, typer.Option("--list", help="List the changes so far.", rich_help_panel=_LOOK)
    ] = False,
    status: Annotated[
        str | None, typer.Option(metavar="ID", help="Tell how far one change is.", rich_help_panel=_LOOK)
    ] = None,
    follow: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Wait for the end of a change; Ctrl-C leaves it alone.", rich_help_panel=_LOOK),
    ] = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Cancel the change that is under way.", rich_help_panel=_LOOK)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Change the source of weights while a server runs; follow, cancel or undo a change; keep versions."""
    from amalgam.cli.server import Server, address_of
    from amalgam.config.server import ServerSettings

    changes = {
        "PATTERN=SOURCE or --remove": rules or remove or None,
        "--like": like,
        "--reload": reload or None,
        "--rollback": rollback or None,
        "--to": to,
    }
    others: dict[str, tuple[Any, Callable[[Server, Any, bool], None]]] = {
        "--pin": (pin, pin_version),
        "--unpin": (unpin, unpin_version),
        "--unname": (unname, remove_name),
        "--versions": (versions or None, list_versions),
        "--diff": (diff, compare_versions),
        "--list": (list_changes or None, list_all_changes),
        "--status": (status, look_at_change),
        "--follow": (follow, follow_change),
        "--cancel": (cancel or None, cancel_running),
    }
    wanted = {**changes, **{flag: value for flag, (value, _) in others.items()}}
    given = [flag for flag, value in wanted.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given)} are given together." if given else "Nothing is asked for.",
            remedy=f"Give one of {', '.join(wanted)}.",
        )
    for flag, is_given in {"--dry-run": dry_run, "--detach": detach, "--name": name is not None}.items():
        if is_given and given[0] in others:
            raise ConfigError(f"{flag} is given with {given[0]}.", remedy=f"Leave {flag} out.")
    if dry_run and rollback:
        raise ConfigError("--dry-run is given with --rollback.", remedy="Name the version with --to.")
    if dry_run and detach:
        raise ConfigError("--dry-run and --detach are given together.", remedy="Give one of them.")
    server = Server(address_of(url, ServerSettings()), key)
    if given[0] in others:
        value, do = others[given[0]]
        do(server, value, as_json)
        return
    body = _body(rules or [], remove or [], like, reload, rollback, to, name)
    if dry_run:
        plan_change(server, body, as_json)
    else:
        change(server, body, as_json, detach=detach)


def _body(
    rules: list[str],
    remove: list[str],
    like: Path | None,
    reload: bool,
    rollback: bool,
    to: str | None,
    name: str | None,
) -> dict[str, Any]:
    """What the server is asked for, as `POST /weights/changes` takes it.

    Raises:
        ConfigError: a rule cannot be read, or a pattern is given twice.
    """
    body: dict[str, Any] = {} if name is None else {"name": name}
    if like is not None:
        from amalgam.config.reading import load_settings

        mixed = load_settings(like).model.mixed_precision
        return body | {"rules": [rule.model_dump() for rule in mixed.all_rules]}
    if reload:
        return body | {"reload": True}
    if rollback:
        return body | {"rollback": True}
    if to is not None:
        return body | {"version": to}
    from amalgam.cli.rules import read_rule

    mapping: dict[str, Any] = {}
    for text in rules:
        rule = read_rule(text, "The rule")
        pattern = rule.pop("pattern")
        if pattern in mapping:
            raise ConfigError(f"{pattern!r} is given twice.", remedy="Name one source for it.")
        mapping[pattern] = rule if "device" in rule else rule["source"]
    for pattern in remove:
        if pattern in mapping:
            raise ConfigError(f"{pattern!r} is given or removed already.", remedy="Do one of them, once.")
        mapping[pattern] = None
    return body | {"weight_mapping": mapping}


def change(server: Server, body: Mapping[str, Any], as_json: bool, *, detach: bool) -> None:
    """Begin a change and follow it to its end; an interrupt cancels it.

    Raises:
        AmalgamError: it was refused, failed or cancelled.
    """
    from amalgam.cli.console import note, print_json, say

    status = server.send("POST", "weights/changes", body)
    path = _path("weights/changes", status["id"])
    if detach:
        if as_json:
            print_json(status)
        else:
            say(f"Change {status['id']} has begun ({status['what']}). --follow {status['id']} waits for its end.")
        return
    try:
        status = _follow(server, path)
    except BaseException as error:
        if not isinstance(error, AmalgamError):
            note(_cancelled(server, path))
        raise
    _show_end(server, status, as_json)


def follow_change(server: Server, change_id: str, as_json: bool) -> None:
    """Follow a change that somebody has begun to its end. Raises the errors of `change`."""
    _show_end(server, _follow(server, _path("weights/changes", change_id)), as_json)


def _show_end(server: Server, status: Mapping[str, Any], as_json: bool) -> None:
    """
    Raises:
        PlanError, CancelledError: the change was not made.
    """
    from amalgam.cli.console import print_json, say
    from amalgam.cli.remap_view import NO_CHANGE, show_groups, told

    if as_json:
        print_json(status)
    if status["state"] != "done":
        kind = CancelledError if status["state"] == "cancelled" else PlanError
        raise kind(f"Change {status['id']} was not made. {status['error']}")
    if as_json:
        return
    if status["num_changed"]:
        query = {"before": status["previous_version"], "after": status["version"]}
        with contextlib.suppress(AmalgamError):  # the change is made, whatever comes of this question
            show_groups(server.get("weights/difference", query)["changes"])
    say(told(status))
    if status["kind"] == "mapping" and not status["num_changed"]:
        say(NO_CHANGE)


def _follow(server: Server, path: str) -> dict[str, Any]:
    """The change's last word."""
    from amalgam.cli.console import progress_bar

    status: dict[str, Any] = {}
    try:
        with progress_bar() as progress:
            for _, status in server.events(f"{path}/events"):
                if status.get("total_bytes"):
                    progress(status["stage"], status["done_bytes"], status["total_bytes"])
    except UnavailableError as error:
        raise UnavailableError(error.what, remedy="The change may go on: look again with --list.") from None
    if status.get("state", "running") == "running":
        raise UnavailableError(
            f"The server drains, and {path} has not ended.", remedy="It ends with the server; look again with --list."
        )
    return status


def _cancelled(server: Server, path: str) -> str:
    try:
        server.send("DELETE", path)
    except AmalgamError as error:
        return f"The change cannot be cancelled any more. {error}"
    return "The change is cancelled; nothing has changed."


def cancel_running(server: Server, _: bool, as_json: bool) -> None:
    """
    Raises:
        ConfigError: no change is under way.
    """
    running = server.get("weights/changes")["running"]
    if running is None:
        raise ConfigError("No change of the weights is under way.", remedy="--list shows those that have ended.")
    status = server.send("DELETE", _path("weights/changes", running))
    _tell(status, as_json, f"Change {running} is cancelled; nothing has changed.")


def plan_change(server: Server, body: Mapping[str, Any], as_json: bool) -> None:
    """What a change would be; nothing changes."""
    from amalgam.cli.console import say
    from amalgam.cli.remap_view import NO_CHANGE, show_plan

    plan = server.send("POST", "weights/plan", body)
    _show(plan, as_json, show_plan)
    if "weight_mapping" in body and not plan["num_changed"] and not as_json:
        say(NO_CHANGE)


def list_versions(server: Server, _: bool, as_json: bool) -> None:
    """The versions in memory."""
    from amalgam.cli.remap_view import show_versions

    _show(server.get("weights"), as_json, show_versions)


def compare_versions(server: Server, versions: tuple[str, str], as_json: bool) -> None:
    """In what two versions differ."""
    from amalgam.cli.remap_view import show_difference

    before, after = versions
    _show(server.get("weights/difference", {"before": before, "after": after}), as_json, show_difference)


def list_all_changes(server: Server, _: bool, as_json: bool) -> None:
    """The changes so far."""
    from amalgam.cli.remap_view import show_changes

    _show(server.get("weights/changes"), as_json, show_changes)


def look_at_change(server: Server, change_id: str, as_json: bool) -> None:
    """How far one change is, or what came of it."""
    from amalgam.cli.remap_view import show_change

    _show(server.get(_path("weights/changes", change_id)), as_json, show_change)


def pin_version(server: Server, version: str, as_json: bool) -> None:
    """Keep a version in memory, by number or name."""
    number = server.get(_path("weights/versions", version))["version"]
    _tell(server.send("PUT", f"weights/pins/{number}"), as_json, f"Version {number} is kept until it is unpinned.")


def unpin_version(server: Server, version: str, as_json: bool) -> None:
    """Keep it no longer."""
    number = server.get(_path("weights/versions", version))["version"]
    told = f"Version {number} is pinned no longer: it goes unless it is current or has a name."
    _tell(server.send("DELETE", f"weights/pins/{number}"), as_json, told)


def remove_name(server: Server, name: str, as_json: bool) -> None:
    """Take a name away."""
    answer = server.send("DELETE", _path("weights/named", name))
    _tell(answer, as_json, f"Version {answer['weight_version']} is called {name} no longer.")


def _path(folder: str, part: str) -> str:
    """The path of something by a name that a user gave.

    Raises:
        ConfigError: the name is empty, which would be another path.
    """
    if not part:
        raise ConfigError("A name or id is empty.", remedy="Give the one that --versions or --list shows.")
    return f"{folder}/{urllib.parse.quote(part, safe='')}"


def _show(answer: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    from amalgam.cli.console import print_json

    if as_json:
        print_json(answer)
    else:
        show(answer)


def _tell(answer: Any, as_json: bool, told: str) -> None:
    from amalgam.cli.console import say

    _show(answer, as_json, lambda _: say(told))
