"""What `amalgam evaluate --sensitivity` shows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from amalgam.cli.console import note, print_json, print_table, progress_bar, resumable, say
from amalgam.config.settings import Settings

if TYPE_CHECKING:
    from amalgam.tools.evaluate import TextOptions
    from amalgam.tools.plan import SensitivityReport

_NUM_TOP = 20


def show_sensitivities(settings: Settings, texts: TextOptions, cache: Path | None, *, as_json: bool) -> None:
    """Measure, or read what was measured before, and show the weights that matter most."""
    from amalgam.cli.plan_view import announce
    from amalgam.tools.plan import PlanOptions, measure_sensitivities

    with resumable(), progress_bar(unit="steps") as progress:
        report = measure_sensitivities(settings, PlanOptions(texts, cache=cache, splits=False), progress, announce)
    if as_json:
        print_json(report.as_json())
        return
    _by_kind(report)
    _top(report)
    ranks = ", ".join(f"{kind} {rank:+.2f}" for kind, rank in report.ranks.items())
    say(f"Scores that need no texts, by their rank correlation with the divergence: {ranks}.")
    note(f"Kept in {report.folder}.")


def _by_kind(report: SensitivityReport) -> None:
    """Part and source → what all weights of it would add."""
    sources = list(dict.fromkeys(source for each in report.weights.values() for source in each["options"]))
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, each in report.weights.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        for source, option in each["options"].items():
            sums[part][source] += option.divergence
    rows = [(part, *(f"{found[source]:.5f}" for source in sources)) for part, found in sums.items()]
    totals = [sum(found[source] for found in sums.values()) for source in sources]
    rows.append(("all", *(f"{total:.5f}" for total in totals)))
    title = f"KL divergence that weights would add, nats a token, on {report.num_tokens:,} tokens"
    print_table(("part", *sources), rows, title, num_totals=1)


def _top(report: SensitivityReport) -> None:
    def worst(name: str) -> float:
        return float(max(option.divergence for option in report.weights[name]["options"].values()))

    rows = []
    for name in sorted(report.weights, key=worst, reverse=True)[:_NUM_TOP]:
        options = report.weights[name]["options"]
        source = max(options, key=lambda key: options[key].divergence)
        found = options[source]
        rows.append(
            (
                name,
                f"{report.weights[name]['num_tokens']:,}",
                source,
                f"{found.divergence:.6f}",
                f"{found.output_error**0.5:.2%}",
                f"{found.rounding_error**0.5:.2%}",
            )
        )
    columns = ("weight", "tokens", "source", "KL divergence", "output error", "rounding error")
    print_table(columns, rows, "The weights that matter most")
