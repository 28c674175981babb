"""What `amalgam trial` shows: the report of a canary or a shadow.

In: reports of the server. Out: tables and sentences on stdout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amalgam.cli.console import print_table, say

Report = Mapping[str, Any]
_WHICH = ("current", "candidate")


def show_report(kind: str, report: Report) -> None:
    """What a candidate is, what it has shown, and the verdict."""
    if report["state"] == "none":
        say(f"There has been no {kind}.")
        return
    number, asked = str(report["candidate"]), str(report["weights"])
    name = "" if asked == number else f" ({asked})"
    automatic = ", and the verdict is carried out" if report["automatic"] else ""
    say(
        f"{kind.capitalize()} of version {number}{name} beside {report['current']}: {report['state']}, "
        f"{report['share']:.4g} of the requests{automatic}."
    )
    if report["checks"]:
        print_table(
            ("check", "figure", "95% interval", "limit", "outcome"), [_check(each) for each in report["checks"]]
        )
    if kind == "canary":
        _show_arms(report["arms"])
    else:
        say(f"{report['requests']:,} requests compared, {report['left_out']:,} left out.")
        if report["figures"] is not None:
            _show_costs(report["figures"])
    verdict = report["verdict"]
    say(f"Verdict: {verdict['outcome']}. {verdict['reason']}")
    if report["reason"] not in ("", verdict["reason"]):
        say(report["reason"])


def _check(check: Mapping[str, Any]) -> tuple[str, ...]:
    sign = "≤" if check["is_most"] else "≥"
    value = check["value"]
    return check["name"], _number(value["value"]), _bounds(value), f"{sign} {check['limit']:g}", check["outcome"]


def _show_arms(arms: Mapping[str, Any]) -> None:
    """Requests and what clients felt, by the weights that answered."""
    rows = [
        (
            which,
            f"{arms[which]['requests']:,}",
            f"{arms[which]['errors']:,}",
            _milliseconds(arms[which]["first_token_seconds"]),
            _milliseconds(arms[which]["token_seconds"]),
        )
        for which in _WHICH
    ]
    print_table(("weights", "requests", "errors", "first token", "next tokens"), rows)


def _show_costs(figures: Mapping[str, Any]) -> None:
    """One core's time for a token, and how likely the answers' tokens are, with both."""
    rows = []
    for name, what in (("prompt_time", "a prompt's token, one core"), ("token_time", "an answer's token, one core")):
        times = figures[name]
        ratio = f"{_number(times['ratio']['value'])} ({_bounds(times['ratio'])})"
        rows.append((what, _milliseconds(times["now"]), _milliseconds(times["candidate"]), ratio))
    now, candidate = (figures[f"perplexity_{which}"]["value"] for which in ("now", "candidate"))
    rows.append(("perplexity of the answers", _number(now), _number(candidate), ""))
    print_table(("", *_WHICH, "ratio (95%)"), rows)


def _bounds(value: Mapping[str, float | None]) -> str:
    return "–" if value["low"] is None else f"{_number(value['low'])} to {_number(value['high'])}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.2f} ms"
