"""Figures of answers whose times are known, computed by hand."""

from __future__ import annotations

import statistics

import pytest

from amalgam.errors import ConfigError
from amalgam.tools.load.client import Answer, Question
from amalgam.tools.load.drawing import benchmark_html
from amalgam.tools.load.metrics import Point, figures, parse_objectives
from amalgam.tools.load.running import Load, Measured
from tests.errors import raises


def answer(
    sent: float, first: float, gap: float, events: int = 5, tokens: int | None = None, error: str = ""
) -> Answer:
    """One that begins `first` seconds after it was sent and goes on with an event in every `gap`."""
    arrivals = [sent + first + index * gap for index in range(events)]
    counts = (None, None) if tokens is None else (10, tokens)
    return Answer(
        Question("q", events),
        due=sent,
        sent=sent,
        arrivals=arrivals,
        ended=arrivals[-1],
        status=200,
        error_kind=error,
        error=error,
        num_prompt_tokens=counts[0],
        num_new_tokens=counts[1],
    )


def point(*answers: Answer, objectives: dict[str, float] | None = None, num_sent: int | None = None) -> Point:
    begin = min(one.sent for one in answers)
    measured = Measured(Load(concurrency=2), list(answers), num_sent or len(answers), begin)
    measured.seconds = max(one.ended for one in answers) - begin
    measured.sending_seconds = max(one.sent for one in answers) - begin
    return figures(measured, objectives)


def test_latencies_and_throughput() -> None:
    found = point(answer(100, 0.5, 0.1, tokens=5), answer(101, 1.5, 0.2, tokens=9))
    assert found.seconds == pytest.approx(3.3)
    assert found.requests_per_second == pytest.approx(2 / 3.3)
    assert found.output_tokens_per_second == pytest.approx(14 / 3.3)
    assert found.total_tokens_per_second == pytest.approx(34 / 3.3)
    first, gaps, per_token, total = (found.latencies[name] for name in ("ttft", "itl", "tpot", "e2e"))
    assert first and gaps and per_token and total
    assert (first.mean, first.p50, first.p90, first.max) == pytest.approx((1.0, 1.0, 1.4, 1.5))
    assert (gaps.count, gaps.mean, gaps.p50) == (8, pytest.approx(0.15), pytest.approx(0.15))
    assert (per_token.min, per_token.max) == (pytest.approx(0.1), pytest.approx(0.1)), "nine tokens in five events"
    assert (total.min, total.max) == (pytest.approx(0.9), pytest.approx(2.3))
    assert found.mean_concurrency == pytest.approx(3.2 / 3.3)
    assert found.tokens_per_event == pytest.approx(1.4) and found.counted_by == "usage"


def test_percentiles_are_those_of_the_standard_library() -> None:
    firsts = [0.01 * (37 * index % 101) + 0.001 for index in range(101)]
    found = point(*(answer(1 + index, first, 0.1) for index, first in enumerate(firsts))).latencies["ttft"]
    assert found
    levels = statistics.quantiles(firsts, n=100, method="inclusive")
    assert (found.p50, found.p90, found.p95, found.p99) == pytest.approx([levels[n - 1] for n in (50, 90, 95, 99)])


def test_tokens_without_usage_are_events() -> None:
    found = point(answer(1, 0.1, 0.1, events=5))
    assert (found.counted_by, found.num_output_tokens, found.tokens_per_event) == ("events", 5, None)
    mixed = point(answer(1, 0.1, 0.1, events=5), answer(1, 0.1, 0.1, events=5, tokens=7))
    assert mixed.num_output_tokens == 12 and "1 of 2" in mixed.counted_by


def test_errors_are_counted_by_kind_and_kept_out_of_latencies() -> None:
    found = point(
        answer(1, 0.1, 0.1),
        answer(1, 9.0, 0.1, error="HTTP 429"),
        answer(1, 9.0, 0.1, error="HTTP 429"),
        answer(1, 9.0, 0.1, error="cut"),
        num_sent=6,
    )
    assert {kind: error.count for kind, error in found.errors.items()} == {"HTTP 429": 2, "cut": 1}
    assert (found.num_completed, found.num_failed, found.num_unfinished) == (1, 3, 2)
    assert found.latencies["ttft"] and found.latencies["ttft"].max == pytest.approx(0.1)
    nothing = point(answer(1, 9.0, 0.1, error="cut"))
    assert nothing.latencies["ttft"] is None and nothing.as_json()["latency_ms"]["ttft"] is None


def test_goodput_takes_what_meets_every_objective() -> None:
    objectives = parse_objectives(["ttft:500ms", "itl:50ms,tpot:0.05s", "e2el:2s"])
    assert objectives == pytest.approx({"ttft": 0.5, "itl": 0.05, "tpot": 0.05, "e2e": 2.0})
    found = point(
        answer(1, 0.5, 0.04, tokens=5),
        answer(1, 0.6, 0.04, tokens=5),  # late
        answer(1, 0.1, 0.06, tokens=9),  # its events are too far apart, its tokens not
        answer(1, 0.1, 0.04, error="cut"),
        answer(1, 0.2, 0.0, events=1, tokens=1),  # has nothing between tokens
        objectives=objectives,
    ).goodput
    assert found and found.share == pytest.approx(2 / 5)
    assert found.by_objective == pytest.approx({"ttft": 3 / 5, "itl": 3 / 5, "tpot": 4 / 5, "e2e": 4 / 5})


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "speed:5ms", "ttft:-5ms", "ttft:0ms", "ttft:5h"])
def test_no_objective(text: str) -> None:
    with raises(ConfigError, text):
        parse_objectives([text])


def test_what_is_under_way_grows_where_more_is_sent_than_answered() -> None:
    """Ten a second for ten seconds: each answered after a second, or each half a second after the one before."""
    sent = [index / 10 for index in range(100)]
    kept_up = point(*(answer(100 + at, 1.0, 0.0) for at in sent))
    piled_up = point(*(answer(100 + at, 1.0 + index * 0.1, 0.0) for index, at in enumerate(sent)))
    assert kept_up.max_concurrency == 10 and abs(kept_up.slope) < 0.2
    assert piled_up.slope == pytest.approx(5, rel=0.1), "ten come in a second, and five go"


def test_a_sending_program_that_is_late_says_so() -> None:
    measured = Measured(Load(concurrency=1), [answer(100, 0.1, 0.02)], 1, 100.0)
    measured.seconds = 1.0
    for lags, cpu_seconds, expected in (([0.001] * 99, 0.1, False), ([0.05] * 99, 0.1, True), ([0.0], 0.95, True)):
        measured.generator.loop_lags, measured.generator.cpu_seconds = lags, cpu_seconds * 0.18
        assert bool(figures(measured).distortion) is expected


def test_a_page_of_several_loads() -> None:
    measured = []
    for clients in (1, 4):
        answers = [answer(1 + index, 0.1 * clients, 0.01, tokens=5) for index in range(5)]
        measured.append(Measured(Load(concurrency=clients), answers, 5, 1.0, 5.5, 4.0))
    points = [figures(one, {"ttft": 0.2}) for one in measured]
    html = benchmark_html(points, measured, {"ttft": 0.2}, None, "<b>model")
    for name in ("clients", "time to first token, p50", "requests under way", "meet the objectives"):
        assert name in html
