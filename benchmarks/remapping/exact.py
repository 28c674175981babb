"""Answers while weights change, beside those of deployments that were opened with the same rules."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remapping.bench import MOST_TOKENS, QUESTIONS, Bench, Change, Weights, clients, until
from remapping.live import LiveServer, Question, StreamedAnswer

from amalgam.config.placement import BASE_SOURCE
from amalgam.engine.params import SamplingParams
from amalgam.runtime.opening import open_deployment

MOST_EXAMPLES = 100  # of answers that differ, which are kept
ANSWERS_BETWEEN = 3  # that end between two re-maps, so that versions live side by side


@dataclass(frozen=True)
class Made:
    """A weight version as it was asked for, and the hash of the weights that the server made of that."""

    rules: Change
    fingerprint: str


@dataclass(frozen=True)
class Offline:
    """Answers of a deployment that runs nothing else: text and number of tokens.

    Attributes:
        kernels: what it computes with; another instruction set rounds otherwise.
    """

    answers: Mapping[Question, tuple[str, int]]
    fingerprint: str
    kernels: Any


async def change_under_load(
    bench: Bench, server: LiveServer, weights: Weights, num_remaps: int
) -> tuple[list[StreamedAnswer], dict[int, Made], dict[str, Any]]:
    """Answers, how each version was made, and memory before and after."""
    first = server.ask("/model_info")["weight_version"]
    made: dict[int, Made] = {first["version"]: Made({}, first["fingerprint"])}
    mapping: Change = {}

    async def load(num_answers: int) -> None:
        async with clients(server, bench.num_streams, lambda: bench.rng.choice(QUESTIONS)) as some:
            await until(lambda: len(some) >= num_answers)

    await load(16 * bench.num_streams)  # touches all blocks of the KV cache
    start = await server.settled_bytes()
    expert = weights.any_expert(bench.rng)
    for source in (*weights.sources, BASE_SOURCE):  # whose headers and code are there from then on
        result = await server.remap(dict.fromkeys(expert, source))
    made[result["weight_version"]] = Made({}, result["fingerprint"])
    before, anonymous_before = await server.settled_bytes(), server.anonymous_bytes
    async with clients(server, bench.num_streams, lambda: bench.rng.choice(QUESTIONS)) as answers:
        for _ in range(num_remaps):
            change = weights.any_change(bench.rng)
            result = await server.remap(change)
            mapping = {**mapping, **change}
            made[result["weight_version"]] = Made(mapping, result["fingerprint"])
            enough = len(answers) + ANSWERS_BETWEEN
            await until(lambda enough=enough: len(answers) >= enough)  # type: ignore[misc]
    if mapping:  # the rules of the beginning: what is resident then is comparable
        result = await server.remap(dict.fromkeys(mapping, BASE_SOURCE))
        made[result["weight_version"]] = Made(dict.fromkeys(mapping, BASE_SOURCE), result["fingerprint"])
    answers += [await server.stream(question) for question in QUESTIONS]  # as many as trust in the version takes
    after, anonymous_after = await server.settled_bytes(), server.anonymous_bytes
    return (
        answers,
        made,
        {
            "resident_at_start": start,
            "resident_before": before,
            "resident_after": after,
            "anonymous_before": anonymous_before,
            "anonymous_after": anonymous_after,
        },
    )


def offline(bench: Bench, mapping: Mapping[str, str], questions: Sequence[Question]) -> Offline:
    """The answers of a deployment that is opened with a version's rules, to one question after the other."""
    alone = {
        "inference.max_batch_size": 1,
        "inference.max_seq_length": MOST_TOKENS,
        "engine.prefix_cache": False,
        "engine.num_threads": 1,
        "speculation.kind": "none",
        "statistics.enabled": False,
    }
    deployment = open_deployment(bench.settings(mapping, **alone))
    try:
        found = {}
        for question in questions:
            params = SamplingParams(
                max_new_tokens=question.num_tokens,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                do_sample=not question.is_greedy,
                seed=question.seed,
                ignore_eos=question.ignore_eos,
            )
            [answer] = deployment.engine.generate([deployment.tokenizer.encode(question.prompt)], params)
            if answer.error is not None:
                raise answer.error
            found[question] = (answer.text, len(answer.token_ids))
        return Offline(found, deployment.version.fingerprint, deployment.engine.kernels)
    finally:
        deployment.close()


def compare(
    bench: Bench,
    answers: Sequence[StreamedAnswer],
    made: Mapping[int, Made],
    kernels: Any,
    num_checked: int | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """How many answers differ from those of an offline run, and the first of them.

    Args:
        kernels: what the server computed with.
        num_checked: versions, drawn at random; None: all.

    Raises:
        RuntimeError: the offline run had other weights, or computed otherwise, so that there is nothing to compare.
    """
    by_version: dict[int, list[StreamedAnswer]] = defaultdict(list)
    for answer in answers:
        assert answer.version is not None
        by_version[answer.version].append(answer)
    checked = sorted(by_version)
    if num_checked is not None and num_checked < len(checked):
        checked = sorted(bench.rng.sample(checked, num_checked))
    differing = 0
    examples: list[dict[str, Any]] = []
    for index, version in enumerate(checked):
        progress(f"version {version}, {index + 1} of {len(checked)}")
        asked = list(dict.fromkeys(answer.question for answer in by_version[version]))
        alone = offline(bench, made[version].rules, asked)
        if alone.fingerprint != made[version].fingerprint:
            raise RuntimeError(f"Weight version {version} had other weights than its rules give.")
        if alone.kernels != kernels:
            raise RuntimeError(f"The server computed with {kernels}, the offline run with {alone.kernels}.")
        for answer in by_version[version]:
            expected = alone.answers[answer.question]
            if (answer.text, answer.num_tokens) != expected:
                differing += 1
                if len(examples) < MOST_EXAMPLES:
                    examples.append(
                        {
                            "version": version,
                            "seed": answer.question.seed,
                            "is_greedy": answer.question.is_greedy,
                            "found": [answer.text, answer.num_tokens],
                            "expected": expected,
                        }
                    )
    return {
        "versions": len(by_version),
        "versions_checked": len(checked),
        "answers_checked": sum(len(by_version[version]) for version in checked),
        "differing": differing,
        "examples": examples,
    }


def show_exact(
    bench: Bench, sources: Sequence[str], num_remaps: int, num_checked: int | None, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = []
    kv_bytes = 0
    for name in ("plain", "prefixes, preemption, guesses"):
        flags: tuple[str, ...] = ("--engine.prefix_cache", "false")
        if kv_bytes:
            # Little more than one sequence may need: there are always some that have to give theirs back.
            small = kv_bytes // min(12, bench.num_streams)
            flags = ("--engine.kv_cache_bytes", str(small), "--speculation.kind", "ngram")
            flags += ("--speculation.adaptive", "false")
        with bench.serving(MOST_TOKENS, *flags) as server:
            about = server.ask("/model_info")
            kv_bytes, kernels = about["memory"]["kv_cache_bytes"], about["kernels"]
            weights = Weights.of(server, sources)
            progress(f"{name}: {num_remaps} re-maps under {bench.num_streams} streams")
            began = time.perf_counter()
            answers, made, memory = asyncio.run(change_under_load(bench, server, weights, num_remaps))
            seconds = time.perf_counter() - began
            counters = server.counters()
        result = compare(bench, answers, made, kernels, num_checked, progress)
        rows.append(
            {
                "variant": name,
                "remaps": num_remaps,
                "seconds": seconds,
                "answers": len(answers),
                "tokens": sum(answer.num_tokens for answer in answers),
                **result,
                "preemptions": int(counters["amalgam_preemptions_total"]),
                "cached_tokens": int(counters["amalgam_prefix_hit_tokens_total"]),
                "guesses_taken": int(counters["amalgam_speculation_accepted_tokens_total"]),
                **memory,
                "resident_ratio": memory["resident_after"] / memory["resident_before"],
                "anonymous_ratio": memory["anonymous_after"] / memory["anonymous_before"],
            }
        )
    return rows
