"""`amalgam bench serve` against a server that does as a script says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tools.load.scripted import Script, head, serving, whole

from amalgam.cli import main


def run(capsys: pytest.CaptureFixture[str], script: Script, *arguments: str) -> tuple[int, dict[str, Any], str, str]:
    """The exit code, the JSON, what stands before it, and stderr."""
    with serving(script) as url:
        code = main(["bench", "serve", "--url", url, *arguments])
    captured = capsys.readouterr()
    *lines, last = captured.out.splitlines() or [""]
    return code, json.loads(last) if last.startswith("{") else {}, "\n".join(lines), captured.err


def test_loads_of_clients(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = Script(whole)
    page, records = tmp_path / "page.html", tmp_path / "records.jsonl"
    code, report, table, _ = run(
        capsys, script, "--concurrency", "1,3", "--requests", "9", "--warmup", "2", "--prompt-tokens", "41",
        "--output-tokens", "5", "--out", str(page), "--records", str(records), "--slo", "ttft:60s", "itl:60s",
    )  # fmt: skip
    assert code == 0
    assert [point["load"]["concurrency"] for point in report["points"]] == [1, 3]
    for point in report["points"]:
        assert point["requests"] == {
            "sent": 9, "completed": 9, "failed": 0, "unfinished": 0, "short": 0, "errors": {},
        }  # fmt: skip
        assert point["tokens"]["prompt_range"] == [41, 41], "two tokens for a word and one more, as it found out"
        assert point["tokens"]["output"] == 45 and point["tokens"]["counted_by"] == "usage"
        assert point["goodput"]["share"] == 1.0
        assert point["latency_ms"]["itl"]["count"] == 36
    assert "answers/s" in table and "TTFT" in table
    assert len(script.requests) == 2 + 2 * (2 + 9), "two that tell how long words are, and warm-ups"
    prompts = {body["prompt"] for _, _, body in script.requests}
    assert len(prompts) == len(script.requests), "the same prompt would be answered from a cache"
    path, headers, body = script.requests[-1]
    assert path == "/v1/completions" and "authorization" not in headers
    assert body["ignore_eos"] is True and body["model"] == "scripted"
    assert "time to first token" in page.read_text()
    assert len(records.read_text().splitlines()) == 18


def test_rates_and_a_key_that_is_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(whole)
    arguments = ["--rate", "400,800", "--requests", "6", "--arrivals", "burst", "--burst", "3", "--endpoint", "chat"]
    arguments += ["--api-key", "sk-secret", "--no-usage", "--no-ignore-eos", "--model", "mine"]
    arguments += ["--body", '{"temperature": 0}', "--warmup", "0"]
    monkeypatch.setattr("sys.argv", ["amalgam", *arguments])
    code, report, table, err = run(capsys, script, *arguments)
    assert code == 0
    assert [point["load"]["rate"] for point in report["points"]] == [400, 800]
    assert report["points"][0]["tokens"]["counted_by"] == "events" and "events" in err
    path, headers, body = script.requests[-1]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer sk-secret"
    assert body["model"] == "mine" and body["temperature"] == 0
    assert "ignore_eos" not in body and "stream_options" not in body
    assert "sk-secret" not in table + err + json.dumps(report)


def test_a_dataset_in_its_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = Script(whole)
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"row {index}"}]} for index in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, report, _, err = run(
        capsys, script, "--dataset", str(path), "--requests", "5", "--concurrency", "1", "--warmup", "0"
    )
    assert code == 0 and report["work"]["rows"] == 3
    asked = [body["messages"][0]["content"] for _, _, body in script.requests]
    assert asked == ["row 0", "row 0", "row 1", "row 2", "row 0", "row 1"], "after the first one, which is a check"
    assert "again" in err
    assert "max_tokens" not in script.requests[-1][2] and "ignore_eos" not in script.requests[-1][2]


def test_a_server_that_goes_away_midway(capsys: pytest.CaptureFixture[str]) -> None:
    code, report, table, err = run(
        capsys, Script(whole, stops_at=20), "--concurrency", "2,4", "--requests", "50", "--warmup", "0"
    )
    assert code == 6 and "went away" in err
    (point,) = report["points"]
    assert report["server_gone"] and point["server_gone"]
    assert 10 <= point["requests"]["completed"] <= 18 and point["latency_ms"]["ttft"]["count"] > 0
    assert {"cut", "connect"} >= set(point["requests"]["errors"]) and "TTFT" in table


def test_refusals_are_figures(capsys: pytest.CaptureFixture[str]) -> None:
    full = head("429 Too Many Requests", "Content-Length: 4") + b"full"
    script = Script(lambda number, body: full if number % 2 and number > 1 else whole(number, body))
    code, report, _, err = run(capsys, script, "--rate", "500", "--requests", "10", "--warmup", "0")
    assert code == 0 and "full" in err
    assert report["points"][0]["requests"]["errors"] == {"HTTP 429": {"count": 5, "example": "full"}}


def test_a_server_that_refuses_the_first_request(capsys: pytest.CaptureFixture[str]) -> None:
    content = b'{"error": {"message": "ignore_eos is unknown"}}'
    bad = head("400 Bad Request", f"Content-Length: {len(content)}") + content
    code, report, _, err = run(capsys, Script(lambda number, body: bad))
    assert code == 2 and not report
    assert "ignore_eos is unknown" in err and "--no-ignore-eos" in err


def test_saturation_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    code, report, table, _ = run(
        capsys, Script(whole), "--find-saturation", "--requests", "4", "--max-concurrency", "2", "--slo", "ttft:60s"
    )
    assert code == 0
    found = report["saturation"]
    assert found["capacity"] > 0 and found["probes"] and found["clients"] in (1, 2)
    assert "Saturated at" in table


BAD = {
    "no address": ["--url", "127.0.0.1"],
    "no rate": ["--rate", "0"],
    "no clients": ["--concurrency", "1.5"],
    "two limits": ["--rate", "1", "--concurrency", "1,2"],
    "strange arrivals": ["--arrivals", "monthly"],
    "a strange endpoint": ["--endpoint", "responses"],
    "no objective": ["--slo", "fast"],
    "a word of no option": ["ttft:5ms"],
    "no body": ["--body", "[1]"],
    "a body with a key twice": ["--body", '{"seed": 1, "seed": 2}'],
    "a body with no number": ["--body", '{"temperature": NaN}'],
    "a body that cannot be sent": ["--body", '{"seed": 1180591620717411303424}'],
    "no length": ["--prompt-tokens", "many"],
    "a long prefix": ["--prompt-tokens", "64", "--shared-prefix", "64"],
    "no dataset": ["--dataset", "nowhere.jsonl"],
    "lengths of a dataset": ["--dataset", "README.md", "--prompt-tokens", "5"],
    "no tokenizer": ["--tokenizer", "tests"],
    "a body's length": ["--body", '{"max_tokens": 5}'],
    "a body that is not streamed": ["--body", '{"stream": false}'],
    "arrivals of clients": ["--arrivals", "constant"],
    "a burst of independent ones": ["--rate", "5", "--burst", "3"],
    "an attainment of nothing": ["--find-saturation", "--attainment", "0.5"],
    "clients of no search": ["--max-concurrency", "5"],
    "beginnings without a length": ["--num-prefixes", "5"],
    "no number": ["--prompt-tokens", "²"],
    "a search of a rate": ["--find-saturation", "--rate", "5"],
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_told_before_anything_is_asked(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", "serve", "--url", "http://127.0.0.1:9", *BAD[case]])
    err = capsys.readouterr().err
    assert code in (2, 3) and err.startswith("Error: ")
    assert "No server answers" not in err
