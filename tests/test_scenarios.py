"""What benchmarks of servers make of the answers that they get."""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from clients import Answer, Request
from faulty.rows import Row, ends_well, is_refused, is_whole, slowest
from questions.from_logits import score_endings, score_words
from questions.make_questions import CHOICES, COUNT, FOLDER, halves
from scenarios.cancel import has_ended
from scenarios.long_prompts import LONG_SEED, NUM_TALKING, Talk, chosen, differences, long_request, short_request
from scenarios.overload import Samples, fates
from scenarios.prefix import operations
from scenarios.throughput import BEST, Cell, ratios_to_peers
from servers import SERVERS

from amalgam.tools.bench import SHAPES


def answer(*arrivals: float, seed: int = 0, text: str = "a", **fields: Any) -> Answer:
    """A whole answer to a request of as many tokens as it has."""
    request = Request("abc", len(arrivals), {"seed": seed})
    known = {"ended": arrivals[-1] if arrivals else 0.0, "status": 200, "num_new_tokens": len(arrivals)}
    return Answer(request, 0.0, text=text, arrivals=list(arrivals), **{**known, **fields})


def test_ours_is_compared_with_each_peer_and_with_the_best_of_each_round() -> None:
    group = {name: server for name, server in SERVERS.items() if server.precision == "bf16"}
    speeds = {"amalgam bf16": [20.0, 30.0], "vLLM bf16": [10.0, 5.0], "llama.cpp bf16": [4.0, 10.0]}
    cells = {
        (name, 4): Cell(name, 4, tokens_per_second=values, first_token_p50=[1 / value for value in values])
        for name, values in speeds.items()
    }
    rows = {row["peer"]: row for row in ratios_to_peers(cells, group, [4])}
    assert {peer: row["throughput"] for peer, row in rows.items()} == {
        "vLLM bf16": [2, 6],
        "llama.cpp bf16": [5, 3],
        BEST: [2, 3],
    }
    assert rows[BEST]["first_token"] == pytest.approx([1 / 2, 1 / 3])
    alone = {"amalgam bf16": group["amalgam bf16"]}
    assert not list(ratios_to_peers(cells, alone, [4]))


def test_refusals_are_told_from_answers_that_are_lost() -> None:
    def refused(seconds: float, after: str) -> Answer:
        return answer(status=503, error_kind="HTTP 503", ended=seconds, retry_after=after, num_new_tokens=None)

    answers = [answer(1.0), answer(1.0, num_new_tokens=0), answer(error_kind="cut", error="It ended.")]
    counts = fates([*answers, refused(0.25, "1"), refused(0.5, "2"), refused(0.5, "2")])
    assert [counts[key] for key in ("sent", "answered", "refused", "lost")] == [6, 1, 3, 2]
    assert counts["lost_how"] == ["It ended."]
    assert counts["refused_after_ms"] == {"p50": 500, "p99": 500, "max": 500}
    assert counts["retry_after"] == {"1": 1, "2": 2}


def test_memory_over_time() -> None:
    assert Samples([size * 2**20 for size in (1, 3, 5, 7, 9)]).memory_mib(2) == [3, 8]
    assert Samples([]).memory_mib() == []


def test_clients_that_left_are_told_from_those_whose_answer_had_ended() -> None:
    unary = Request("a", 1, {"stream": False})
    assert has_ended(Answer(unary, 0.0, status=200)) and not has_ended(Answer(unary, 0.0))
    assert has_ended(answer(1.0)) and not has_ended(answer(1.0, num_new_tokens=None))


def test_answers_are_compared_with_those_of_the_same_request_alone() -> None:
    alone = [answer(1.0, seed=1, text="one"), answer(1.0, seed=2, text="two")]
    together = [answer(1.0, seed=1, text="one"), answer(1.0, seed=2, text="owt"), answer(1.0, seed=3)]
    assert differences(together, alone) == {"checked": 2, "answers": 2, "differing": 1, "differing_seeds": [2]}
    shorter = [answer(1.0, 2.0, seed=1, text="one")]
    assert differences(shorter, alone)["differing"] == 1


def test_all_long_prompts_are_repeated_and_some_of_the_others() -> None:
    short, long = (
        [short_request(seed) for seed in range(40)],
        [long_request(index, round_) for index, round_ in [(0, 0), (3, 1)]],
    )
    picked = chosen([*short, *long, *short], 10)
    assert len(picked) == 12 and picked == chosen([*short, *long], 10)
    assert [request.prompt for request in picked if request.fields["seed"] >= LONG_SEED] == [one.prompt for one in long]
    assert {len(request.prompt) for request in short} == {32, 64, 128, 256} and len(long[0].prompt) == 4000
    beginnings = {request.prompt[:16] for request in short}
    assert len(beginnings) == 4 and len({request.prompt for request in short}) == 40


def test_gaps_are_those_before_and_while_prompts_are_computed() -> None:
    talked = [answer(1, 2, 3, 4, 8, 12, 30) for _ in range(NUM_TALKING)]
    talk = Talk(talked, [answer(12, 13), answer(10, 11)], 4.0, {})
    figures = talk.figures()
    assert (figures["before"]["gap_p50"], figures["during"]["gap_p99"]) == (1, 4)
    assert (figures["p99_to_p50"], figures["p99_to_undisturbed_p50"]) == (1, 4)


def test_operations_of_a_prompt() -> None:
    """Of shape S: 56.6 million weights of a layer's projections and active experts, 65.5 million of the head."""
    shape = SHAPES["S"]
    one = operations(shape, 0, 1)
    assert one == 8 * (2 * (2048 * 128 * 72 + 8 * 3 * 2048 * 768) + 4 * 32 * 128) + 2 * 2048 * 32000
    parts = operations(shape, 0, 2048) + operations(shape, 2048, 2112) - 2 * 2048 * 32000
    assert operations(shape, 0, 2112) == parts
    assert 64 / 2112 < operations(shape, 2048, 2112) / operations(shape, 0, 2112) < 0.035


def test_rows_of_faults() -> None:
    assert [Row("", 1, limit, "s", 1, wrong).verdict for limit, wrong in [(2, 0), (1, 0), (2, 1)]] == [
        "kept",
        "over",
        "wrong",
    ]
    answers = [(0.25, httpx.Response(422)), (0.5, httpx.Response(500)), (0.1, httpx.Response(599))]
    row = slowest("", 50, answers, is_refused)
    assert (row.measured, row.count, row.wrong) == (500, 3, 2)
    stream = {"content-type": "text/event-stream; charset=utf-8"}
    whole = 'data: {"text":"an \\"error\\":"}\n\ndata: [DONE]\n\n'
    failed = 'data: {"error":{}}\n\ndata: [DONE]\n\n'
    for text, is_good, has_end in ((whole, True, True), (failed, False, True), (whole[:-9], True, False)):
        response = httpx.Response(200, headers=stream, text=text)
        assert (is_whole(response), ends_well(response)) == (is_good, has_end)
    assert ends_well(httpx.Response(503)) and not ends_well(httpx.Response(599))


def test_questions_and_their_scores() -> None:
    questions = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(questions) == COUNT
    assert all(len(set(row["endings"])) == CHOICES and 0 <= row["answer"] < CHOICES for row in questions)
    assert halves("How does it end?") == ("How does", "it end?")
    some = [{"endings": ["a long one", "b"], "answer": 0}, {"endings": ["c", "d"], "answer": 1}]
    assert score_endings([[-4.0, -3.0], [-2.0, -1.0]], some) == {"acc": 0.5, "acc_norm": 1.0}
    assert score_words([" a short one", "c"], some) == 0.5
