"""What `amalgam prune` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amalgam.base.counting import counted
from amalgam.base.sizes import human_bytes
from amalgam.cli.console import interval, note, print_table, say
from amalgam.evaluation.confidence import Interval

if TYPE_CHECKING:
    from amalgam.tools.pruning.comparing import Point
    from amalgam.tools.pruning.running import Cut, PruneReport

_MAX_NAMED = 20


def show(report: PruneReport) -> None:
    """What goes, what was written, how it does beside plans of the same bytes, and what to make of that."""
    _show_cuts(report.cuts)
    if report.points:
        _show_points(report)
    written = report.written
    if written is not None:
        say(f"Written: {written.folder}")
        if written.num_resumed:
            say(f"Went on behind {counted(written.num_resumed, 'file')} that an earlier run had finished.")
        for what, names in (
            ("Copied as they are, beside the model's weights", written.carried),
            ("Not carried over: tensors", written.left_out_tensors),
            ("Not carried over: files", written.left_out_files),
        ):
            if names:
                more = f" and {len(names) - _MAX_NAMED} more (all with --json)" if len(names) > _MAX_NAMED else ""
                say(f"{what}: {', '.join(names[:_MAX_NAMED])}{more}")
    for sentence in report.advice:
        say(sentence)
    if not report.points:
        note("Not compared with plans of the same bytes: whether it is worth it is not known.")


def _show_cuts(cuts: Sequence[Cut]) -> None:
    rows = [
        (
            cut.name,
            _change(cut.num_layers),
            _counts(cut),
            _change(cut.parameters, millions=True),
            _change(cut.active_parameters, millions=True),
            f"{human_bytes(cut.nbytes[0])} → {human_bytes(cut.nbytes[1])}",
            "–" if cut.zeros is None else f"{cut.zeros:.0%}",
        )
        for cut in cuts
    ]
    columns = ("", "layers", "experts", "parameters", "active", "bytes", "zeros")
    print_table(columns, rows, "What remains")


def _change(pair: tuple[int, int], *, millions: bool = False) -> str:
    before, after = (f"{value / 1e6:,.2f} M" if millions else str(value) for value in pair)
    return before if before == after else f"{before} → {after}"


def _counts(cut: Cut) -> str:
    if not cut.expert_counts:
        return "–"
    low, high = min(cut.expert_counts), max(cut.expert_counts)
    return f"{high} a layer" if low == high else f"{low} to {high} a layer"


def _show_points(report: PruneReport) -> None:
    rows = []
    for point in report.points:
        rows.append(_row(point, "all"))
        rows += [_row(point, domain) for domain in point.difference if domain != "all"]
    columns = ("", "MB", "plan, bits", "domain", "KL, cut", "KL, plan", "cut / plan", "better")
    title = f"Beside plans of the same bytes: KL from the whole wide model, nats a token, {report.num_tokens} tokens"
    print_table(columns, rows, title)


def _times(difference: Interval) -> str:
    """A ratio less 1 as the ratio: `1.25 (1.09 to 1.45)`."""
    bounds = (None if value is None else 1 + value for value in (difference.low, difference.high))
    return interval(Interval(1 + difference.value, *bounds), "{:.3g}")


def _row(point: Point, domain: str) -> tuple[str, ...]:
    is_first = domain == "all"
    return (
        point.candidate if is_first else "",
        f"{point.nbytes / 1e6:.2f}" if is_first else "",
        f"{point.plan_bits:.2f}" if is_first else "",
        domain,
        interval(point.divergence[domain], "{:.4f}"),
        interval(point.plan_divergence[domain], "{:.4f}"),
        _times(point.difference[domain]),
        point.winners[domain],
    )
