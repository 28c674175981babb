"""What filters take: processor time for each token and character, how much text is held back, and served throughput.

    python benchmarks/filters.py [--rounds 5] [--seconds-only]

Text: English and Chinese prose with figures, a token being four characters. Time is that of the processor, as others
compute too. Throughput: 16 requests of 64 tokens of the demo model through the server's endpoint in this
process, without and with filters in turn. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from amalgam.config.filters import FiltersSettings
from amalgam.config.reading import load_settings
from amalgam.config.settings import Settings
from amalgam.runtime.opening import open_deployment
from amalgam.server.local import LocalServer
from amalgam.text.filters.passing import TextFilter
from amalgam.text.filters.personal import KINDS
from amalgam.text.filters.rules import Rule, make_rules
from amalgam.tools.bench import commit, hardware

DEMO = Path(__file__).parent.parent / "models/demo"
TEXT = "The quick brown fox jumps over 3 lazy dogs, 人工智能 and 3.14 times more of it. On 2026-11-29 she said: no.\n"
NUM_CHARS, TOKEN_CHARS = 40_000, 4
PII = {"name": "pii", "pii": list(KINDS)}
WORDS = {"name": "words", "words": [f"word{index}" for index in range(10_000)], "action": "block"}
REGEXES = {"name": "regexes", "regexes": [r"TICKET-\d{4,8}", r"(?:confidential|internal) \w+", r"\p{Han}{2,4}公司"]}
SETS: dict[str, list[dict[str, Any]]] = {
    "personal data": [PII], "10,000 words": [WORDS], "3 expressions": [REGEXES], "all three": [PII, WORDS, REGEXES],
}  # fmt: skip


def rules_of(rules: Sequence[dict[str, Any]]) -> tuple[Rule, ...]:
    return make_rules(FiltersSettings.model_validate({"rules": rules}))


def microseconds(rules: Sequence[Rule], text: str, size: int, rounds: int) -> float:
    """For each piece of `size` characters, the median of the rounds; the automaton's states are there already."""
    times = []
    for number in range(rounds + 1):
        passing = TextFilter(rules)
        started = time.process_time()
        for start in range(0, len(text), size):
            passing.push(text[start : start + size])
            passing.release()
        if number:
            times.append((time.process_time() - started) / (len(text) / size) * 1e6)
    return median(times)


def held_back(rules: Sequence[Rule], text: str) -> float:
    """Characters that have come and not left, on the average over pieces."""
    passing, num_in, num_out, waiting = TextFilter(rules), 0, 0, []
    for start in range(0, len(text), TOKEN_CHARS):
        piece = text[start : start + TOKEN_CHARS]
        passing.push(piece)
        num_in += len(piece)
        num_out = passing.release().end
        waiting.append(num_in - num_out)
    return mean(waiting)


async def throughput(rounds: int) -> dict[str, list[float]]:
    """New tokens a second, by round."""
    overrides = {"inference.device_map": "cpu", "inference.max_seq_length": 512}
    settings = load_settings(None, {"model.base_path": str(DEMO), **overrides}, environ={})
    filtered: Settings = settings.replace(filters={"rules": SETS["all three"]})
    deployment = open_deployment(settings)
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    try:
        servers = {"without": LocalServer(deployment, settings), "with": LocalServer(deployment, filtered)}
        for server in servers.values():
            await server.start()
        body = {"prompts": ["It was a dark night, and"] * 16, "max_new_tokens": 64, "ignore_eos": True, "seed": 1}
        for number in range(rounds + 1):
            for name, server in servers.items():
                started = time.monotonic()
                status, answer = await server.post("/batch_generate", body)
                assert status == 200, answer
                num_tokens = sum(details["generated_tokens"] for details in answer["details"])
                if number:
                    speeds[name].append(num_tokens / (time.monotonic() - started))
    finally:
        deployment.close()
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds-only", action="store_true", help="no throughput")
    arguments = parser.parse_args()
    text = (TEXT * (NUM_CHARS // len(TEXT) + 1))[:NUM_CHARS]
    figures: dict[str, dict[str, float]] = {}
    print(f"{'filters':16} {'µs a token':>11} {'µs a character of a prompt':>27} {'characters held back':>21}")
    for name, rules in SETS.items():
        made = rules_of(rules)
        row = {
            "token_us": microseconds(made, text, TOKEN_CHARS, arguments.rounds),
            "character_us": microseconds(made, text, NUM_CHARS, arguments.rounds) / NUM_CHARS,
            "held_characters": held_back(made, text),
        }
        figures[name] = row
        print(f"{name:16} {row['token_us']:11.1f} {row['character_us']:27.2f} {row['held_characters']:21.1f}")
    speeds: dict[str, list[float]] = {}
    if not arguments.seconds_only:
        speeds = asyncio.run(throughput(arguments.rounds))
        for name, values in speeds.items():
            print(f"{name} filters: {median(values):,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "filters": figures, "speeds": speeds}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
