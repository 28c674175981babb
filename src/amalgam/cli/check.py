"""`amalgam check`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.base.counting import counted
from amalgam.cli.options import refuse_unused
from amalgam.errors import AmalgamError, ConfigError

if TYPE_CHECKING:
    from amalgam.tools.check.contract import Check
    from amalgam.tools.check.running import Report
    from amalgam.tools.check.target import Target
    from amalgam.tools.check.thresholds import Thresholds

_NOT_READY, _COULD_NOT_RUN, _INTERRUPTED = 1, 2, 130
_SECONDS, _QUICK_SECONDS = 300.0, 90.0
_PROFILES = ("", "chat", "batch")
_SERVER, _WHAT, _BESIDE, _OUT = "The server", "What is checked", "What lies beside the server", "Output"


def command(
    url: Annotated[
        str, typer.Option(help="Address of any server that speaks OpenAI's interface.", rich_help_panel=_SERVER)
    ] = "http://127.0.0.1:8080",
    key: Annotated[
        str,
        typer.Option(
            "--key", "--api-key", envvar="OPENAI_API_KEY", help="Key of an ordinary user.", rich_help_panel=_SERVER
        ),
    ] = "",
    admin_key: Annotated[
        str,
        typer.Option(
            envvar="AMALGAM_SERVER_ADMIN_KEY",
            help="Key for checks that need an administrator.",
            rich_help_panel=_SERVER,
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="Model to ask. Default: the first that the server lists.", rich_help_panel=_SERVER)
    ] = "",
    file: Annotated[
        Path | None,
        typer.Option("--thresholds", metavar="FILE", help="What is good enough (YAML).", rich_help_panel=_WHAT),
    ] = None,
    profile: Annotated[
        str, typer.Option(metavar="chat|batch", help="Which thresholds [chat].", rich_help_panel=_WHAT)
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Ask a fifth as much.", rich_help_panel=_WHAT)] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ID|CATEGORY|PATTERN", help="Repeatable: only these checks.", rich_help_panel=_WHAT),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="ID|CATEGORY|PATTERN", help="Repeatable: all but these.", rich_help_panel=_WHAT),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help=f"What has not begun by then is skipped [{_SECONDS:g}, with --quick {_QUICK_SECONDS:g}].",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="The server's log.", rich_help_panel=_BESIDE)] = None,
    rules: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Repeatable: alerting rules for Prometheus.", rich_help_panel=_BESIDE),
    ] = None,
    prometheus: Annotated[
        str, typer.Option(metavar="URL", help="A Prometheus that reads the server.", rich_help_panel=_BESIDE)
    ] = "",
    server_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What the server was started with.", rich_help_panel=_BESIDE),
    ] = None,
    backup: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A copy of that file, or a folder with one.", rich_help_panel=_BESIDE),
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option(min=1, help="Its process on this machine. Default: who listens.", rich_help_panel=_BESIDE),
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PID",
            help="END this process with SIGTERM, while a stream is under way, to see that nothing is lost.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A warning counts as a failure.", rich_help_panel=_OUT)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_OUT)] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.", rich_help_panel=_OUT)] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit's XML.", rich_help_panel=_OUT)] = None,
    list_checks: Annotated[
        bool, typer.Option("--list", help="Show the checks and why each matters; ask nobody.", rich_help_panel=_OUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent; ask nobody.", rich_help_panel=_OUT)
    ] = False,
    print_thresholds: Annotated[
        bool,
        typer.Option("--print-thresholds", help="Print every threshold as YAML; ask nobody.", rich_help_panel=_OUT),
    ] = False,
) -> int:
    """Check whether a running server is ready for production: measure it, and say what to mend.

    Nothing changes the server, unless --drain names a process to end. The exit code is 0 when it is ready, 1 when a
    check failed, 2 when checks could not run, for lack of time too, 130 after Ctrl-C (what was found is reported).
    """
    from amalgam.tools.check.registry import chosen
    from amalgam.tools.check.target import Evidence, Target
    from amalgam.tools.check.thresholds import as_yaml, read_thresholds
    from amalgam.tools.load.http import Address

    if profile not in _PROFILES:
        raise ConfigError(f"--profile is {profile!r}.", remedy="Expected chat or batch.")
    thresholds = read_thresholds(file, profile)
    thresholds = thresholds.quick() if quick else thresholds
    if print_thresholds:
        sys.stdout.write(as_yaml(thresholds))
        return 0
    checks = chosen(only or (), skip or ())
    if list_checks:
        _show_list(checks, thresholds, as_json=as_json)
        return 0
    if drain is not None:
        refuse_unused({"--drain": not any(check.is_opt_in for check in checks)}, "operation.drain", "Do not skip it.")
    refuse_unused({"--backup": backup and server_config is None}, "--server-config", "Name the file it is a copy of.")
    evidence = Evidence(log, tuple(rules or ()), prometheus, server_config, backup, pid or drain, drain)
    seconds = max_seconds or (_QUICK_SECONDS if quick else _SECONDS)
    try:
        target = Target(Address.parse(url), thresholds, key, admin_key, model, evidence)
        return _run(target, checks, seconds, None if dry_run else _Output(strict, as_json, html, junit))
    except AmalgamError as error:
        from amalgam.cli.console import note

        note(f"Error: {error}")
        return _COULD_NOT_RUN


@dataclass(frozen=True)
class _Output:
    """How the report is shown, and where it is written."""

    is_strict: bool
    as_json: bool
    html: Path | None
    junit: Path | None


def _run(target: Target, checks: tuple[Check, ...], seconds: float, output: _Output | None) -> int:
    """`output` is None: only say what would be sent."""
    from amalgam.base.files import check_writable
    from amalgam.cli.console import note, print_json, progress_bar, say
    from amalgam.tools.check.running import Report, announcement, run
    from amalgam.tools.load.benchmark import run_until_interrupted

    for path in () if output is None else (output.html, output.junit):
        if path is not None:
            check_writable(path)
    target.verify_evidence()
    told = announcement(target, checks, seconds)
    if output is None:
        say(told)
        return 0
    note(told)
    report = Report(target, checks)
    with progress_bar("checks") as progress:
        is_whole = run_until_interrupted(run(target, report, seconds, progress))
    if output.as_json:
        print_json({**report.as_json(), "interrupted": not is_whole})
    else:
        _show(report, is_strict=output.is_strict)
    _write(report, output)
    if not is_whole:
        note("Interrupted.")
        return _INTERRUPTED
    if report.num_failed(is_strict=output.is_strict):
        return _NOT_READY
    return _COULD_NOT_RUN if report.out_of_time else 0


def _write(report: Report, output: _Output) -> None:
    from amalgam.base.files import replace_file, writing
    from amalgam.cli.console import note
    from amalgam.tools.check.html import render_html
    from amalgam.tools.check.junit import render_junit

    contents: dict[Path | None, Any] = {output.html: lambda: render_html(report, is_strict=output.is_strict)}
    contents[output.junit] = lambda: render_junit(report)
    for path, render in contents.items():
        if path is not None:
            with writing(path):
                replace_file(path, render())
            note(f"Wrote {path}.")


def _show(report: Report, *, is_strict: bool) -> None:
    from amalgam.cli.console import print_statuses, print_table, say
    from amalgam.tools.check.contract import CATEGORIES, Status

    for category, title in CATEGORIES.items():
        results = [result for result in report.results if result.check.category == category]
        if results:
            rows = [
                (result.status.value, result.check.id, result.finding.value, result.finding.threshold)
                for result in results
            ]
            print_statuses(("", "check", "seen", "expected"), rows, title)
    faults = [result for result in report.results if result.status in (Status.FAIL, Status.WARN)]
    if faults:
        print_table(("check", "why", "remedy"), [(r.check.id, r.check.why, r.remedy) for r in faults], "What to mend")
    counts = ", ".join(f"{count} {status.value}" for status, count in report.counts.items())
    verdict = "Ready" if report.is_ready(is_strict=is_strict) else "NOT ready"
    say(f"{verdict}: {counts}; {counted(report.target.num_requests, 'request')} in {report.seconds:.0f} s.")
    for line in report.target.notes:
        say(line)


def _show_list(checks: tuple[Check, ...], thresholds: Thresholds, *, as_json: bool) -> None:
    from amalgam.cli.console import print_json, print_table

    if as_json:
        print_json(
            [
                {
                    "id": check.id, "title": check.title, "why": check.why, "remedy": check.remedy,
                    "requests": check.num_requests(thresholds),
                }
                for check in checks
            ]
        )  # fmt: skip
        return
    print_table(("check", "what", "why"), [(check.id, check.title, check.why) for check in checks])
