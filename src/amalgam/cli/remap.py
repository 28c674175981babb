"""`amalgam remap`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.errors import AmalgamError, CancelledError, ConfigError, PlanError, UnavailableError

if TYPE_CHECKING:
    from amalgam.cli.server import Server

_SERVER, _CHANGE, _LOOK = "The server", "What is changed", "Instead of a change"


def command(
    rules: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATTERN=SOURCE]...", help="Where weights come from: names or patterns, and a source."),
    ] = None,
    url: Annotated[str, typer.Option(help="Address of the server.", rich_help_panel=_SERVER)] = "http://127.0.0.1:8080",
    key: Annotated[
        str,
        typer.Option(envvar="AMALGAM_SERVER_ADMIN_KEY", help="The server's admin key.", rich_help_panel=_SERVER),
    ] = "",
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would change, and change nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Begin, and do not wait for the end.")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="List the versions in memory.", rich_help_panel=_LOOK)
    ] = False,
    list_changes: Annotated[
        bool, typer.Option("--list", help="List the changes so far.", rich_help_panel=_LOOK)
    ] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Cancel the change that is under way.", rich_help_panel=_LOOK)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Change where a running server's weights come from, follow it, go back. Requests go on meanwhile."""
    from amalgam.cli.server import Server, address_of
    from amalgam.config.settings import ServerSettings

    wanted = {
        "PATTERN=SOURCE or --remove": bool(rules or remove),
        "--like": like is not None,
        "--reload": reload,
        "--rollback": rollback,
        "--to": to is not None,
        "--versions": versions,
        "--list": list_changes,
        "--cancel": cancel,
    }
    given = [flag for flag, is_given in wanted.items() if is_given]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given)} are given together." if given else "Nothing is asked for.",
            remedy=f"Give one of {', '.join(wanted)}.",
        )
    is_look = versions or list_changes or cancel
    for flag, is_given in {"--dry-run": dry_run, "--detach": detach, "--name": name is not None}.items():
        if is_given and is_look:
            raise ConfigError(f"{flag} is given with {given[0]}.", remedy=f"Leave {flag} out.")
    if dry_run and rollback:
        raise ConfigError("--dry-run is given with --rollback.", remedy="Name the version with --to.")
    if dry_run and detach:
        raise ConfigError("--dry-run and --detach are given together.", remedy="Give one of them.")
    server = Server(address_of(url, ServerSettings()), key)
    if versions:
        show_versions(server, as_json)
    elif list_changes:
        show_changes(server, as_json)
    elif cancel:
        cancel_running(server, as_json)
    else:
        body = _body(rules or [], remove or [], like, reload, rollback, to, name)
        if dry_run:
            show_plan(server, body, as_json)
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
    mapping: dict[str, str | None] = {}
    for text in rules:
        pattern, equals, source = text.rpartition("=")
        if not (pattern and equals and source):
            raise ConfigError(
                f"The rule is {text!r}.", remedy="Expected PATTERN=SOURCE, such as 'model.layers.3.*=fp8'."
            )
        if pattern in mapping:
            raise ConfigError(f"{pattern!r} is given twice.", remedy="Name one source for it.")
        mapping[pattern] = source
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
    path = f"weights/changes/{status['id']}"
    if detach:
        if as_json:
            print_json(status)
        else:
            say(f"Change {status['id']} has begun ({status['what']}).")
        return
    try:
        status = _follow(server, path)
    except BaseException as error:
        if not isinstance(error, AmalgamError):
            note(_cancelled(server, path))
        raise
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


def told(status: Mapping[str, Any]) -> str:
    """What a change that went live did, in a line."""
    from amalgam.cli.console import human_bytes

    what = f"called {status['name']}" if status["name"] else f"live (before: {status['previous_version']})"
    return (
        f"Version {status['version']} is {what}: {status['num_changed']:,} weights differ, "
        f"{human_bytes(status['loaded_bytes'])} read, {status['seconds']:.1f} s."
    )


def show_plan(server: Server, body: Mapping[str, Any], as_json: bool) -> None:
    """What a change would be."""
    from amalgam.cli.console import human_bytes, print_json, say

    plan = server.send("POST", "weights/plan", body)
    if as_json:
        print_json(plan)
        return
    show_groups(plan["changes"])
    say(
        f"{plan['num_changed']:,} weights would change: {human_bytes(plan['read_bytes'])} to read, "
        f"{human_bytes(plan['peak_bytes'])} of memory at most ({human_bytes(plan['available_bytes'])} are available), "
        f"about {plan['seconds']:.1f} s. Nothing has changed."
    )
    if not plan["has_room"]:
        say("The change would be refused: there is not enough memory.")


def show_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Weights that differ, by what they were and what they are."""
    from amalgam.cli.console import arrow, human_bytes, named, print_table

    rows = [
        (
            f"{group['num_weights']:,}",
            arrow(group["source_before"], group["source_after"]),
            arrow(group["format_before"], group["format_after"]),
            human_bytes(group["bytes_before"]),
            human_bytes(group["bytes_after"]),
            named(group["examples"], group["num_weights"]),
        )
        for group in groups
    ]
    if rows:
        print_table(("weights", "source", "format", "bytes before", "after", "for instance"), rows)


def show_versions(server: Server, as_json: bool) -> None:
    """The versions in memory, and the change under way."""
    from amalgam.cli.console import human_bytes, print_json, print_table, say

    answer = server.get("weights")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            str(version["version"]),
            ", ".join([*version["states"], *(f"“{name}”" for name in version["names"])]),
            version["fingerprint"],
            datetime.fromtimestamp(version["created"]).isoformat(" ", "seconds"),
            str(version["requests"]),
            human_bytes(version["bytes"]),
            human_bytes(version["own_bytes"]),
            ", ".join(f"{name} {human_bytes(size)}" for name, size in version["bytes_by_format"].items()),
        )
        for version in answer["versions"]
    ]
    columns = ("version", "why it is there", "fingerprint", "made", "requests", "bytes", "its own", "by format")
    print_table(columns, rows)
    say(f"Together {human_bytes(answer['bytes'])}; {human_bytes(answer['available_bytes'])} of memory for more.")


def show_changes(server: Server, as_json: bool) -> None:
    """The changes so far, the latest last."""
    from amalgam.cli.console import human_bytes, print_json, print_table

    answer = server.get("weights/changes")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            status["id"],
            datetime.fromtimestamp(status["started_at"]).isoformat(" ", "seconds"),
            status["what"],
            _state(status),
            "" if status["version"] is None else str(status["version"]),
            f"{status['num_changed']:,}",
            human_bytes(status["loaded_bytes"]),
            f"{status['seconds']:.1f}",
            status["error"] or "",
        )
        for status in answer["changes"]
    ]
    print_table(("change", "begun", "what", "state", "version", "changed", "read", "seconds", "why not"), rows)


def _state(status: Mapping[str, Any]) -> str:
    if status["state"] != "running" or not status["total_bytes"]:
        return str(status["state"])
    return f"{status['stage'].lower()}, {status['done_bytes'] / status['total_bytes']:.0%}"


def cancel_running(server: Server, as_json: bool) -> None:
    """
    Raises:
        ConfigError: no change is under way.
    """
    from amalgam.cli.console import print_json, say

    running = server.get("weights/changes")["running"]
    if running is None:
        raise ConfigError("No change of the weights is under way.", remedy="--list shows those that have ended.")
    status = server.send("DELETE", f"weights/changes/{running}")
    if as_json:
        print_json(status)
    else:
        say(f"Change {running} is cancelled; nothing has changed.")
