"""What `amalgam remap` shows: versions, changes, plans, differences.

In: answers of the server. Out: tables and sentences on stdout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from amalgam.base.counting import counted
from amalgam.base.sizes import human_bytes
from amalgam.cli.console import arrow, named, print_table, say, with_device

NO_CHANGE = (
    "Each weight that is named comes from there already, or a more specific rule decides for it: "
    "`amalgam plan --config FILE --explain NAME` says which; --remove takes a rule away."
)


def told(status: Mapping[str, Any]) -> str:
    """What a change that was made did, in a line."""
    what = f"called {status['name']}" if status["name"] else f"live (before: {status['previous_version']})"
    return (
        f"Version {status['version']} is {what}: {counted(status['num_changed'], 'weight')} changed, "
        f"{human_bytes(status['loaded_bytes'])} read, {status['seconds']:.1f} s."
    )


def show_plan(plan: Mapping[str, Any]) -> None:
    """What a change would be."""
    show_groups(plan["changes"])
    say(
        f"{counted(plan['num_changed'], 'weight')} would change: {human_bytes(plan['read_bytes'])} to read, "
        f"{human_bytes(plan['peak_bytes'])} of memory at most ({human_bytes(plan['available_bytes'])} are available), "
        f"about {plan['seconds']:.1f} s. Nothing has changed."
    )
    for name, device in plan.get("devices", {}).items():
        say(
            f"{name}: {human_bytes(device['new_bytes'])} to bring there, {human_bytes(device['available_bytes'])} are "
            "available."
        )
    if not plan["has_room"]:
        say("The change would be refused: there is not enough memory.")


def show_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Weights that differ, by what they were and what they are."""
    rows = [
        (
            f"{group['num_weights']:,}",
            with_device(
                arrow(group["source_before"], group["source_after"]),
                group.get("device_before"),
                group.get("device_after"),
            ),
            arrow(group["format_before"], group["format_after"]),
            human_bytes(group["bytes_before"]),
            human_bytes(group["bytes_after"]),
            named(group["examples"], group["num_weights"]),
        )
        for group in groups
    ]
    if rows:
        print_table(("weights", "source", "format", "bytes before", "after", "for instance"), rows)


def show_difference(answer: Mapping[str, Any]) -> None:
    """In what two versions differ."""
    show_groups(answer["changes"])
    say(f"Versions {answer['before']} and {answer['after']} differ in {counted(answer['num_changed'], 'weight')}.")


def show_versions(answer: Mapping[str, Any]) -> None:
    """The versions in memory."""
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


def show_changes(answer: Mapping[str, Any]) -> None:
    """The changes so far, the latest last."""
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


def show_change(status: Mapping[str, Any]) -> None:
    """How far one change is, or what came of it."""
    state = _state(status)
    if status["state"] == "running":
        state = f"{state}, {status['num_done']:,} of {status['num_weights']:,} weights are read"
        if status["seconds_left"] is not None:
            state += f", about {status['seconds_left']:.0f} s are left"
    outcome = told(status) if status["state"] == "done" else status["error"] or ""
    say(f"Change {status['id']} ({status['what']}): {state}. {outcome}".rstrip())
