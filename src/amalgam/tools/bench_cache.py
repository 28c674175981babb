"""What the KV cache saves: the same text generated with it, and without, when each step computes the whole text again.

In: a running engine that shares no blocks between requests, lengths. Out: a `CacheReport`. Must never know: files,
HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np
import plotly.graph_objects as go

from amalgam.base.figures import COLOURS, page
from amalgam.composition.progress import Progress
from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.models.spec import ModelSpec
from amalgam.tools.bench import random_ids

Row = tuple[int, int]  # tokens of the prompt, new tokens


@dataclass(frozen=True)
class Ratio:
    """What `num_new_tokens` after a prompt took both ways.

    Attributes:
        with_seconds, without_seconds: from the request to the last token, with the cache and without; medians.
        ratio: the median of the rounds' ratios.
        tokens_with, tokens_without: how many tokens went through the model.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    with_seconds: float
    without_seconds: float
    ratio: float
    tokens_with: int
    tokens_without: int

    @property
    def token_ratio(self) -> float:
        """What the ratio would be if a step took as long as it has tokens."""
        return self.tokens_without / self.tokens_with


@dataclass(frozen=True)
class StepCost:
    """A step over a text and a step over one token behind it: why the ratio is not that of the tokens.

    Attributes:
        num_tokens: of the text: the prompt and half of what was generated.
    """

    num_tokens: int
    text_seconds: float
    token_seconds: float

    @property
    def ratio(self) -> float:
        return self.text_seconds / self.token_seconds


@dataclass
class CacheReport:
    """Everything that was measured.

    Attributes:
        num_equal, num_compared: tokens that came out alike both ways.
    """

    rows: list[Ratio] = field(default_factory=list)
    steps: list[StepCost] = field(default_factory=list)
    num_equal: int = 0
    num_compared: int = 0

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "token_ratio": row.token_ratio} for row in self.rows]
        steps = [{**asdict(step), "ratio": step.ratio} for step in self.steps]
        return {"rows": rows, "steps": steps, "num_equal": self.num_equal, "num_compared": self.num_compared}


def tokens_computed(num_prompt_tokens: int, num_new_tokens: int) -> tuple[int, int]:
    """How many tokens go through the model for so many new ones, with the cache and without.

    With it the prompt once and then each token but the last; without it the whole text at each step.
    """
    without = num_new_tokens * num_prompt_tokens + num_new_tokens * (num_new_tokens - 1) // 2
    return num_prompt_tokens + num_new_tokens - 1, without


def measure(
    engine: Engine,
    spec: ModelSpec,
    prompts: Sequence[int],
    num_tokens: int,
    repeats: int,
    progress: Progress | None = None,
) -> CacheReport:
    """
    Args:
        prompts: their lengths.
        num_tokens: new ones; the rows have 1, 2, 4, … of them, and all.
    """
    report = CacheReport()
    lengths = sorted({2**power for power in range(num_tokens.bit_length())} | {num_tokens})
    for length in prompts:
        cached: list[list[float]] = []
        recomputed: list[list[float]] = []
        for repeat in range(repeats):
            prompt = random_ids(spec, length, repeat)
            new_ids, seconds = _with_cache(engine, prompt, num_tokens)
            cached.append(seconds)
            recomputed.append([])
            for index, token_id in enumerate(new_ids):
                found, step = _first_token(engine, prompt + new_ids[:index])
                recomputed[-1].append(step)
                report.num_equal += found == token_id
                report.num_compared += 1
                if progress is not None:
                    done = repeat * num_tokens + index + 1
                    progress(f"Prompt of {length}", done, repeats * num_tokens)
        totals = [(list(accumulate(a)), list(accumulate(b))) for a, b in zip(cached, recomputed, strict=True)]
        for new in lengths:
            pairs = [(a[new - 1], b[new - 1]) for a, b in totals]
            report.rows.append(
                Ratio(
                    length,
                    new,
                    median(a for a, _ in pairs),
                    median(b for _, b in pairs),
                    median(b / a for a, b in pairs),
                    *tokens_computed(length, new),
                )
            )
        middle = num_tokens // 2
        report.steps.append(
            StepCost(
                length + middle,
                median(float(np.median(_around(steps, middle))) for steps in recomputed),
                median(median(steps[1:]) for steps in cached),
            )
        )
    return report


def _around(steps: Sequence[float], middle: int, most: int = 4) -> Sequence[float]:
    """The steps next to one: texts that are nearly as long."""
    return steps[max(0, middle - most) : middle + most + 1]


def _greedy(num_tokens: int) -> SamplingParams:
    """The likeliest token each time: with and without the cache the same ones."""
    return SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def _with_cache(engine: Engine, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """The new tokens, and the seconds that each took."""
    token_ids: list[int] = []
    times: list[float] = []
    ended = threading.Event()
    errors: list[Exception] = []

    def on_output(output: RequestOutput) -> None:
        token_ids.extend(output.token_ids)
        times.extend([time.perf_counter()] * len(output.token_ids))
        if output.is_finished:
            errors.extend([output.error] if output.error else [])
            ended.set()

    started = time.perf_counter()
    engine.submit(prompt, _greedy(num_tokens), on_output)
    ended.wait()
    if errors:
        raise errors[0]
    return token_ids, [after - before for before, after in zip([started, *times], times, strict=False)]


def _first_token(engine: Engine, text: Sequence[int]) -> tuple[int, float]:
    """What follows a text of which nothing is computed yet, and the seconds that it took."""
    token_ids, (seconds,) = _with_cache(engine, text, 1)
    return token_ids[0], seconds


def cache_html(report: CacheReport, model: str) -> str:
    """The ratios by length as a page: as measured, and as the tokens alone would have it."""
    figure = go.Figure()
    prompts = list(dict.fromkeys(row.num_prompt_tokens for row in report.rows))
    for number, length in enumerate(prompts):
        rows = [row for row in report.rows if row.num_prompt_tokens == length]
        new = [row.num_new_tokens for row in rows]
        for name, values, dash in (
            ("measured", [row.ratio for row in rows], "solid"),
            ("tokens computed", [row.token_ratio for row in rows], "dot"),
        ):
            figure.add_scatter(
                x=new,
                y=values,
                name=f"prompt of {length}, {name}",
                mode="lines+markers",
                line={"color": COLOURS[number % len(COLOURS)], "dash": dash},
            )
    figure.update_layout(
        title=f"{model}: time without the KV cache, in times of that with it",
        xaxis_title="new tokens",
        yaxis_title="times as long",
        xaxis_type="log",
        yaxis_type="log",
        template="plotly_white",
        hovermode="x unified",
    )
    return page(figure)
