"""What `amalgam plan --diff` reads and shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amalgam.base.counting import counted
from amalgam.base.sizes import human_bytes
from amalgam.cli.console import arrow, named, print_json, print_table, say, with_device
from amalgam.cli.server import Server, address_of, key_of, no_server_of_ours
from amalgam.config.server import ServerSettings
from amalgam.tools.difference import PlanDifference, checked_manifest, read_plan

if TYPE_CHECKING:
    from amalgam.composition.progress import Progress


def manifest_of(place: str, server: ServerSettings, progress: Progress) -> dict[str, Any]:
    """The manifest of a plan that a configuration, a manifest's file or a running server has.

    Args:
        server: has the key of a server that needs one.

    Raises:
        AmalgamError: there is no plan at `place`.
    """
    if not place.startswith(("http://", "https://")):
        return read_plan(place, progress)
    url = address_of(place, server)
    try:
        return checked_manifest(Server(url, key_of(server)).get("manifest"))
    except ValueError:
        raise no_server_of_ours(url) from None


def show_difference(places: tuple[str, str], found: PlanDifference, as_json: bool, *, show_all: bool) -> None:
    """
    Args:
        places: of the plans, before and after.
        show_all: whether every weight has a line.
    """
    if as_json:
        print_json({"before": places[0], "after": places[1], **found.as_json()})
        return
    if show_all:
        rows = [
            (
                weight.name,
                with_device(
                    arrow(weight.source_before, weight.source_after), weight.device_before, weight.device_after
                ),
                arrow(weight.format_before, weight.format_after),
                human_bytes(weight.bytes_before),
                human_bytes(weight.bytes_after),
            )
            for weight in found.changed
        ]
        print_table(("weight", "source", "format", "bytes before", "after"), rows)
    elif found.changed:
        groups = [
            (
                str(len(group)),
                with_device(arrow(*key[:2]), *key[4:]),
                arrow(*key[2:4]),
                human_bytes(sum(weight.bytes_before for weight in group)),
                human_bytes(sum(weight.bytes_after for weight in group)),
                named([weight.name for weight in group], len(group)),
            )
            for key, group in found.groups.items()
        ]
        print_table(("weights", "source", "format", "bytes before", "after", "for instance"), groups)
    for names, place in ((found.only_before, places[0]), (found.only_after, places[1])):
        if names:
            say(f"In {place} alone: {counted(len(names), 'weight')}: {named(names, len(names))}")
    change = found.bytes_after - found.bytes_before
    say(
        f"{len(found.changed):,} of {found.num_weights:,} weights differ. As stored: {human_bytes(found.bytes_before)} "
        f"→ {human_bytes(found.bytes_after)} ({'+' if change >= 0 else '−'}{human_bytes(abs(change))}). "
        f"Fingerprints: {found.fingerprint_before} → {found.fingerprint_after}."
    )
