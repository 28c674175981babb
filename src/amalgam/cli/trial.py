"""`amalgam trial`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from amalgam.cli.address import DEFAULT_URL, AdminKey, Url
from amalgam.errors import ConfigError, PlanError
from amalgam.planning.trial_plans import Kind

if TYPE_CHECKING:
    from amalgam.cli.server import Server

POLL_SECONDS = 1.0  # between two looks at a trial that is waited for
_BEGIN, _LIMITS = "How it is tried", "Limits of the checks"
_ONLY: dict[str, Kind] = {
    "--max-error-increase": "canary",
    "--max-divergence": "shadow",
    "--min-agreement": "shadow",
    "--max-requests": "shadow",
    "--max-tokens": "shadow",
    "--max-share": "shadow",
}


def command(
    kind: Annotated[
        Kind | None,
        typer.Argument(
            help="canary: a share of the requests runs on the candidate; shadow: both compute the same answers.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="The candidate to begin with: its number or name.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: AdminKey = "",
    share: Annotated[
        float | None,
        typer.Option(help="Of the requests, 0 to 1. A canary that runs takes another.", rich_help_panel=_BEGIN),
    ] = None,
    automatic: Annotated[
        bool, typer.Option("--automatic", help="Have the server carry the verdict out.", rich_help_panel=_BEGIN)
    ] = False,
    max_requests: Annotated[
        int | None, typer.Option(help="Shadow: compare at most so many requests.", rich_help_panel=_BEGIN)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Shadow: compare at most so many tokens of each.", rich_help_panel=_BEGIN)
    ] = None,
    max_share: Annotated[
        float | None, typer.Option(help="Shadow: take at most this share of one core.", rich_help_panel=_BEGIN)
    ] = None,
    min_requests: Annotated[
        int | None, typer.Option(help="No verdict to promote before so many.", rich_help_panel=_LIMITS)
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(help="Times as long a token may take.", rich_help_panel=_LIMITS)
    ] = None,
    max_error_increase: Annotated[
        float | None, typer.Option(help="Canary: share of requests that may fail beyond now.", rich_help_panel=_LIMITS)
    ] = None,
    max_divergence: Annotated[
        float | None, typer.Option(help="Shadow: KL divergence, nats a token.", rich_help_panel=_LIMITS)
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Shadow: share of tokens that are likeliest for both.", rich_help_panel=_LIMITS)
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Let all new requests run on the candidate, whatever the verdict.")
    ] = False,
    end: Annotated[bool, typer.Option("--end", help="Try the candidate no more.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the verdict; the exit code is 4 unless it is to promote.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Try other weights on a running server's requests: begin, show the report, promote, end.

    Without a version it shows the report. Options that are not given have the server's defaults.
    """
    from amalgam.cli.server import Server, address_of
    from amalgam.config.server import ServerSettings

    options = {
        "--share": share,
        "--automatic": automatic or None,
        "--max-requests": max_requests,
        "--max-tokens": max_tokens,
        "--max-share": max_share,
        "--min-requests": min_requests,
        "--max-slowdown": max_slowdown,
        "--max-error-increase": max_error_increase,
        "--max-divergence": max_divergence,
        "--min-agreement": min_agreement,
    }
    given = {flag: value for flag, value in options.items() if value is not None}
    asked = {"VERSION": weights is not None, "--promote": promote, "--end": end, "--wait": wait}
    _check(kind, {flag for flag, is_asked in asked.items() if is_asked}, set(given))
    server = Server(address_of(url, ServerSettings()), key)
    if kind is None:
        _show_both(server, as_json)
    elif promote:
        _promote(server, kind, as_json)
    else:
        path = f"weights/{kind}"
        if weights is not None:
            fields = {flag.removeprefix("--").replace("-", "_"): value for flag, value in given.items()}
            report = server.send("PUT", path, {"weights": weights, **fields})
        else:
            report = server.send("DELETE", path) if end else server.get(path)
        if wait:
            report = _decided(server, kind, report)
        _show(kind, report, as_json)
        if wait:
            _check_promotes(kind, report)


def _check(kind: Kind | None, asked: set[str], given: set[str]) -> None:
    """
    Raises:
        ConfigError: an argument would have no effect.
    """
    if kind is None and asked | given:
        raise ConfigError(
            f"{min(asked | given)} is given without a kind.", remedy=f"Name one: {' or '.join(get_args(Kind))}."
        )
    if len(asked) > 1 and asked != {"VERSION", "--wait"}:
        raise ConfigError(f"{' and '.join(sorted(asked))} are given together.", remedy="Give one of them.")
    for flag in sorted(given):
        if "VERSION" not in asked:
            raise ConfigError(f"{flag} is given without a version.", remedy="Name the candidate.")
        if _ONLY.get(flag, kind) != kind:
            raise ConfigError(f"{flag} is given for a {kind}.", remedy=f"It is of a {_ONLY[flag]}: leave it out.")


def _show_both(server: Server, as_json: bool) -> None:
    from amalgam.cli.console import print_json

    reports: dict[Kind, Any] = {kind: server.get(f"weights/{kind}") for kind in get_args(Kind)}
    if as_json:
        print_json(reports)
        return
    for kind, report in reports.items():
        _show(kind, report, as_json=False)


def _show(kind: Kind, report: dict[str, Any], as_json: bool) -> None:
    from amalgam.cli.console import print_json
    from amalgam.cli.trial_view import show_report

    if as_json:
        print_json(report)
    else:
        show_report(kind, report)


def _promote(server: Server, kind: Kind, as_json: bool) -> None:
    from amalgam.cli.console import print_json, say

    answer = server.send("POST", f"weights/{kind}/promote")
    if as_json:
        print_json(answer)
    else:
        say(f"Version {answer['weight_version']} is live (before: {answer['previous_version']}).")


def _decided(server: Server, kind: Kind, report: dict[str, Any]) -> dict[str, Any]:
    """The report once there is a verdict or the trial has ended.

    Raises:
        ConfigError: there is nothing to wait for.
    """
    if report["state"] == "none":
        raise ConfigError(f"There has been no {kind}.", remedy="Begin one: name the candidate.")
    while report["state"] == "running" and report["verdict"]["outcome"] == "undecided":
        time.sleep(POLL_SECONDS)
        report = server.get(f"weights/{kind}")
    return report


def _check_promotes(kind: Kind, report: dict[str, Any]) -> None:
    """
    Raises:
        PlanError: the verdict is another one, or the trial has ended without one.
    """
    verdict = report["verdict"]
    if report["state"] != "promoted" and (report["state"] != "running" or verdict["outcome"] != "promote"):
        reason = report["reason"] or verdict["reason"]
        raise PlanError(f"The {kind} of version {report['candidate']} is not to be promoted. {reason}")
