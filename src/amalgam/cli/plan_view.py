"""What `amalgam plan --budget` does and shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from amalgam.base.sizes import human_bytes
from amalgam.cli.console import interval, note, print_json, print_table, progress_bar, resumable, say
from amalgam.config.settings import Settings

if TYPE_CHECKING:
    from amalgam.planning.devices import Share
    from amalgam.planning.sensitivity import Cost
    from amalgam.tools.plan import PlanOptions, PlanReport

_MAX_CHECKS = 12


def plan_for_budget(
    settings: Settings,
    options: PlanOptions,
    budget: str,
    out: Path | None,
    config: Path | None,
    frontier: Path | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Plan, write, and show what was chosen and why."""
    from amalgam.cli.experts import saved_set_of
    from amalgam.tools.plan import make_plan

    if isinstance(options.use, str) and options.use.startswith(("http://", "https://")):
        options = replace(options, use=saved_set_of(options.use))
    with resumable(), progress_bar(unit="steps") as progress:
        report = make_plan(
            settings,
            options,
            budget,
            out=out,
            config=config,
            frontier=frontier,
            force=force,
            progress=progress,
            announce=announce,
        )
    if as_json:
        print_json(report.as_json())
        return
    _show(report)
    for remark in report.remarks:
        note(remark)
    for written in (out, frontier):
        if written is not None:
            say(f"Written: {written}")


def announce(cost: Cost) -> None:
    """What measuring sensitivities takes, before it starts."""
    if not cost.num_weights:
        note(f"Sensitivities: all {cost.num_layers} layers were measured before.")
        return
    before = f" ({cost.num_done} of {cost.num_layers} layers are there already)" if cost.num_done else ""
    note(
        f"Sensitivities: {cost.num_options:,} options of {cost.num_weights:,} weights on {cost.num_tokens:,} tokens"
        f"{before}: about {cost.seconds:.0f} s, {human_bytes(cost.read_bytes)} to read, "
        f"{human_bytes(cost.memory_bytes)} of memory beside one layer's weights."
    )


def _show(report: PlanReport) -> None:
    rows = [
        (kind.role, kind.part, _listed(kind.sources), f"{kind.bits_per_weight:.2f}", f"{kind.expected:.5f}")
        for kind in report.kinds
    ]
    title = f"The plan for {report.budget}" if report.is_accepted else f"{report.chosen}, for {report.budget}"
    print_table(("role", "part", "weights by source", "bits", "expected KL"), rows, title)
    compared = [("the plan", "", interval(report.plan_divergence, "{:.5f}"), "")]
    compared += [
        (rival.kind, rival.name, interval(rival.divergence, "{:.5f}"), interval(rival.difference, "{:+.1%}"))
        for rival in report.rivals
    ]
    print_table(("way of planning", "", "KL divergence, held out", "the plan to it"), compared)
    say(
        f"{report.bits_per_weight:.3f} bits a weight, {human_bytes(report.weights_bytes)} of weights, "
        f"{human_bytes(report.other_bytes)} of KV cache and workspace. The choice is within {report.gap:.2%} of the "
        f"best by expected divergence (HiGHS, {report.solve_seconds:.1f} s)."
    )
    if report.shares:
        _show_shares(report)
    if report.tokens_per_second is not None:
        expected, measured = report.tokens_per_second
        say(f"One sequence: {expected:.1f} tok/s expected, {measured:.1f} measured.")
    say(_verdict(report))
    if report.checks:
        checks = sorted(report.checks, key=lambda check: -check.measured)[:_MAX_CHECKS]
        cells = [
            (
                check.part,
                f"{check.first_layer}–{check.last_layer}",
                f"{check.expected:.5f}",
                f"{check.measured:.5f} ± {check.error:.5f}",
                f"{check.factor:.2f}",
            )
            for check in checks
        ]
        columns = ("part", "layers", "expected", "measured", "factor")
        print_table(columns, cells, "Sensitivities checked: what taking a group back to base removes")


def _verdict(report: PlanReport) -> str:
    """What the proof says, of the rivals that were measured."""
    from amalgam.planning.proof import DECIDING, deciding_of

    deciding = deciding_of(report.rivals)
    if not deciding:
        return "Returned without proof: there is no uniform plan and no hand recipe that it would have to beat."
    beaten = " and ".join(f"that of the best {DECIDING[rival.kind]}" for rival in deciding)
    if report.is_accepted:
        return f"Accepted: its divergence is below {beaten}, with 95% confidence."
    returned = "the better of them" if len(deciding) > 1 else "that one"
    return (
        f"Not accepted: its divergence is not below {beaten} with 95% confidence. "
        f"Returned is {returned}: {report.chosen}."
    )


def _show_shares(report: PlanReport) -> None:
    """What lies where, and why."""
    rows = [
        (
            share.device.name,
            human_bytes(share.device.budget_bytes),
            human_bytes(share.dense_bytes),
            f"{share.num_experts} ({_range(share.of_layer)} of a layer)",
            human_bytes(share.expert_bytes),
            human_bytes(share.other_bytes) if share.is_primary else "",
            human_bytes(share.device.budget_bytes - share.nbytes),
            f"{share.activations:.1%}",
            human_bytes(share.read_bytes),
            "not known" if share.seconds is None else f"{share.seconds * 1e3:.2f} ms",
        )
        for share in report.shares
    ]
    columns = (
        "device", "budget", "dense", "experts", "take", "KV, workspace", "spare", "activations", "a step reads", "in",
    )  # fmt: skip
    print_table(columns, rows, "What lies where")
    first = next(share for share in report.shares if share.is_primary)
    say(
        f"{first.device.name} computes everything dense and holds the KV cache. Its experts have "
        f"{first.activations:.1%} of the activations with {_share_of_bytes(first, report.shares):.1%} of the experts' "
        "bytes; a step's others are computed where they lie, at the same time."
    )
    for share in report.shares:
        rate = "" if share.device.bandwidth is None else f"{share.device.bandwidth / 1e9:,.0f} GB/s, "
        say(f"{share.device.name} is read at: {rate}{share.device.origin}.")
    say(
        f"Times are bytes over bandwidths, expected and not measured; within {report.seconds_gap:.2%} of the fastest "
        "placement of this quality."
    )


def _share_of_bytes(share: Share, shares: Sequence[Share]) -> float:
    return share.expert_bytes / max(1, sum(each.expert_bytes for each in shares))


def _range(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _listed(sources: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {source}" for source, count in sources.items())
