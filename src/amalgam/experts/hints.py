"""What the statistics suggest, in words, each with its figures.

In: counts, precisions, divergences. Out: `Hint`s, the most important first. Must never know: how they are shown.

Usage alone misleads: a seldom used expert may matter much. So hints say what was seen, and never that an expert can go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from amalgam.base.sizes import human_bytes
from amalgam.experts.comparison import jensen_shannon, mean_or_none
from amalgam.experts.history import Tally
from amalgam.experts.precision_map import PrecisionMap
from amalgam.experts.snapshot import ExpertSnapshot
from amalgam.experts.statistics import HOT, balance, relative_share

MIN_TOKENS = 256  # below, differences are chance
COLD = 0.25  # times an even share
MIN_USES = 20  # an expert that an even use would have taken so often may be called unused
DIVERGENCE = 0.1  # bits; two halves of the same traffic stay below a tenth of it
MAX_PER_KIND = 5
MAX_LISTED = 64
SEVERITIES = ("warning", "notice", "info")


@dataclass(frozen=True)
class Hint:
    """One observation. `figures` holds every number in the text."""

    kind: str  # hot_narrow, cold_wide, unused, unbalanced, domain or drift
    severity: str  # one of SEVERITIES
    text: str
    text_zh: str
    figures: dict[str, Any] = field(default_factory=dict)
    layer_id: int | None = None
    expert_id: int | None = None
    compare: dict[str, str] | None = None  # the sides `a` and `b` of the comparison that shows it

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def find_hints(
    snapshot: ExpertSnapshot,
    precisions: PrecisionMap | None = None,
    labels: Mapping[str, Tally] | None = None,
    drift: Mapping[str, Any] | None = None,
) -> list[Hint]:
    """All hints. None while fewer than `MIN_TOKENS` tokens have been counted.

    Args:
        labels: counts of each label.
        drift: as `overview.drift_or_reason` gives it.
    """
    num_tokens = int(snapshot.tally.num_tokens.sum())
    if num_tokens < MIN_TOKENS or not snapshot.layer_ids:
        return []
    found = [
        *(_hot_narrow(snapshot, precisions) if precisions is not None else ()),
        *_unbalanced(snapshot),
        *_domains(snapshot, labels or {}),
        *_drifted(drift or {}),
        *_unused(snapshot, num_tokens),
        *(_cold_wide(snapshot, precisions) if precisions is not None else ()),
    ]
    return sorted(found, key=lambda hint: SEVERITIES.index(hint.severity))


def _hot_narrow(snapshot: ExpertSnapshot, precisions: PrecisionMap) -> Iterator[Hint]:
    relative = relative_share(snapshot.tally.counts.sum(axis=0), snapshot.sizes)
    wide = precisions.wide_bits
    is_found = (relative >= HOT) & precisions.is_narrow
    cells = np.argwhere(is_found)
    order = np.argsort(-relative[is_found], kind="stable")[:MAX_PER_KIND]
    for row, expert_id in cells[order].tolist():
        layer_id, times, bits = (
            snapshot.layer_ids[row],
            float(relative[row, expert_id]),
            precisions.bits[row, expert_id],
        )
        formats = ", ".join(dict.fromkeys(filter(None, precisions.formats[row][expert_id])))
        yield Hint(
            "hot_narrow",
            "warning",
            f"Layer {layer_id}, expert {expert_id} is used {times:.1f} times as often as the mean and is kept in "
            f"{formats} ({bits:.1f} bits); the widest experts have {wide:.1f} bits.",
            f"第 {layer_id} 层的专家 {expert_id} 使用频率是平均值的 {times:.1f} 倍，"
            f"却保存为 {formats}（{bits:.1f} 位）；最宽的专家为 {wide:.1f} 位。",
            {"times_mean": times, "bits": float(bits), "wide_bits": wide, "formats": formats, "num_found": len(cells)},
            layer_id,
            expert_id,
        )


def _cold_wide(snapshot: ExpertSnapshot, precisions: PrecisionMap) -> Iterator[Hint]:
    relative = relative_share(snapshot.tally.counts.sum(axis=0), snapshot.sizes)
    is_found = (relative <= COLD) & precisions.is_wide & snapshot.exists
    if not is_found.any():
        return
    bits, narrow = precisions.bits[is_found], precisions.narrow_bits
    sizes = precisions.nbytes.sum(axis=-1)[is_found]
    num_found, wide, size, saved = (
        len(bits),
        float(bits.max()),
        int(sizes.sum()),
        int((sizes * (1 - narrow / bits)).sum()),
    )
    yield Hint(
        "cold_wide",
        "info",
        f"{'1 expert' if num_found == 1 else f'{num_found} experts'} with at most a quarter of the mean use "
        f"{'is' if num_found == 1 else 'are'} kept in wide formats (up to {wide:.1f} bits, {human_bytes(size)}); "
        f"at the narrowest's {narrow:.1f} bits that would be {human_bytes(saved)} less.",
        f"{num_found} 个使用量不超过平均值四分之一的专家保存在较宽的格式中（至多 {wide:.1f} 位，{human_bytes(size)}）；"
        f"改为最窄的 {narrow:.1f} 位可节省 {human_bytes(saved)}。",
        {
            "num_experts": num_found,
            "bytes": size,
            "saved_bytes": saved,
            "wide_bits": wide,
            "narrow_bits": narrow,
            "experts": _listed(snapshot, is_found),
        },
    )


def _unused(snapshot: ExpertSnapshot, num_tokens: int) -> Iterator[Hint]:
    is_found = (snapshot.tally.counts.sum(axis=0) == 0) & snapshot.exists
    if not is_found.any() or num_tokens * snapshot.num_active_experts < MIN_USES * snapshot.num_experts:
        return
    num_found, num_all = int(is_found.sum()), sum(snapshot.expert_counts)
    yield Hint(
        "unused",
        "notice",
        f"{num_found} of {num_all} experts {'was' if num_found == 1 else 'were'} never used in {num_tokens} tokens.",
        f"在 {num_tokens} 个词元中，{num_all} 个专家里有 {num_found} 个从未被使用。",
        {
            "num_experts": num_found,
            "total_experts": num_all,
            "tokens": num_tokens,
            "experts": _listed(snapshot, is_found),
        },
    )


def _unbalanced(snapshot: ExpertSnapshot) -> Iterator[Hint]:
    figures = balance(snapshot.tally.counts.sum(axis=0), snapshot.sizes)
    worst = snapshot.num_experts / max(snapshot.num_active_experts, 1)  # all tokens take the same experts
    limit = min(3.0, 0.6 * worst)
    max_to_mean = np.nan_to_num(figures["max_to_mean"])
    rows = np.flatnonzero(max_to_mean >= limit)
    for row in rows[np.argsort(-max_to_mean[rows], kind="stable")][:MAX_PER_KIND].tolist():
        layer_id, times, entropy = snapshot.layer_ids[row], float(max_to_mean[row]), figures["normalized_entropy"][row]
        yield Hint(
            "unbalanced",
            "notice",
            f"Layer {layer_id} is out of balance: its busiest expert is used {times:.1f} times as often as the mean "
            f"(normalised entropy {entropy:.2f}).",
            f"第 {layer_id} 层不均衡：最忙的专家使用频率是平均值的 {times:.1f} 倍（归一化熵 {entropy:.2f}）。",
            {
                "max_to_mean": times,
                "normalized_entropy": float(entropy),
                "gini": float(figures["gini"][row]),
                "num_found": len(rows),
            },
            layer_id,
        )


def _domains(snapshot: ExpertSnapshot, labels: Mapping[str, Tally]) -> Iterator[Hint]:
    if snapshot.minutes is not None or snapshot.label is not None:
        return  # labels are counted since the reset
    found = []
    for label, tally in labels.items():
        num_tokens, counts = int(tally.num_tokens.sum()), tally.counts.sum(axis=0)
        others = snapshot.tally.counts.sum(axis=0) - counts
        num_others = int(snapshot.tally.num_tokens.sum()) - num_tokens
        if min(num_tokens, num_others) < MIN_TOKENS:
            continue
        by_layer = jensen_shannon(counts, others)
        mean = mean_or_none(by_layer)
        if mean is not None and mean >= DIVERGENCE:
            row = int(np.nanargmax(by_layer))
            found.append((mean, label, num_tokens, snapshot.layer_ids[row], float(by_layer[row])))
    for mean, label, num_tokens, layer_id, most in sorted(found, reverse=True)[:MAX_PER_KIND]:
        yield Hint(
            "domain",
            "notice",
            f"Requests labelled “{label}” use other experts than the rest: they differ by {mean:.2f} bits on average, "
            f"most in layer {layer_id} ({most:.2f} bits).",
            f"标记为“{label}”的请求所用专家与其他请求不同：平均相差 {mean:.2f} 比特，"
            f"第 {layer_id} 层差别最大（{most:.2f} 比特）。",
            {"label": label, "jensen_shannon": mean, "tokens": num_tokens, "layer_jensen_shannon": most},
            layer_id,
            compare={"a": f"label:{label}", "b": f"rest:{label}"},
        )


def _drifted(drift: Mapping[str, Any]) -> Iterator[Hint]:
    mean = drift.get("jensen_shannon", {}).get("mean")
    if mean is None or mean < DIVERGENCE or min(drift["tokens"], drift["reference_tokens"]) < MIN_TOKENS:
        return
    minutes, reference = drift["minutes"], drift["reference"]
    yield Hint(
        "drift",
        "warning",
        f"The last {minutes:g} minutes use other experts than the reference ({reference}): "
        f"they differ by {mean:.2f} bits.",
        f"最近 {minutes:g} 分钟所用的专家与参考（{reference}）相差 {mean:.2f} 比特。",
        {
            "jensen_shannon": mean,
            "minutes": minutes,
            "tokens": drift["tokens"],
            "reference_tokens": drift["reference_tokens"],
        },
        compare=drift["compare"],
    )


def _listed(snapshot: ExpertSnapshot, is_found: Any) -> list[dict[str, int]]:
    cells = np.argwhere(is_found)[:MAX_LISTED].tolist()
    return [{"layer_id": snapshot.layer_ids[row], "expert_id": expert_id} for row, expert_id in cells]
