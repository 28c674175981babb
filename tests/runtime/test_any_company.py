"""The demo model: whatever shares steps, blocks and the queue, each answer is bit for bit what it is alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Semaphore

import pytest

from amalgam.config.reading import load_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from tests.conftest import write_demo_config
from tests.server.conftest import wait_until

EXPERTS = "model.layers.*.mlp.experts.*"
SETTINGS = {"inference.max_seq_length": 256, "inference.max_batch_size": 12, "engine.block_size": 8}
NUM_REQUESTS = 30
NUM_AT_ONCE = 20  # at the beginning: too many for the blocks, however long changes of the weights take afterwards
_BLOCK_BYTES = 8 * 6 * 2 * 2 * 64 * 2  # tokens, layers, keys and values, heads, dimensions, bfloat16

Work = tuple[list[int], SamplingParams]
Answer = tuple[tuple[int, ...], tuple[object, ...]]  # tokens, and their log-probabilities


# Without guesses and with some, taken whether or not they pay; with those, more streams than a step of 48 tokens holds.
COMPANIES: dict[str, dict[str, object]] = {
    "plain": {},
    "ngram": {"speculation.kind": "ngram", "speculation.min_match": 1, "inference.max_batch_size": 32},
    "self": {"speculation.kind": "self", "inference.max_batch_size": 32},
}
MAPPINGS = ({EXPERTS: "int4"}, {EXPERTS: "base"})


@pytest.fixture(params=COMPANIES)
def deployment(demo_config: Path, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """So few blocks that requests are preempted all the time, and so few tokens in a step that prompts are cut."""
    with_blocks = {**SETTINGS, "engine.kv_cache_bytes": 36 * _BLOCK_BYTES, "engine.max_step_tokens": 48}
    company = {"speculation.adaptive": False, **COMPANIES[request.param]}
    deployment = open_deployment(load_settings(demo_config, {**with_blocks, **company}, {}))
    yield deployment
    deployment.close()


@pytest.fixture(scope="module")
def work_and_answers(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Work], list[list[Answer]]]:
    """What is asked, and for each mapping what it answers when asked one by one."""
    settings = {**SETTINGS, "inference.max_batch_size": 1, "engine.prefix_cache": False}
    config = write_demo_config(tmp_path_factory.mktemp("alone"), derived)
    alone = open_deployment(load_settings(config, settings, {}))
    try:
        work = requests(alone, random.Random(12))
        answers = []
        for mapping in MAPPINGS:
            alone.update_weight_mapping(mapping)
            found = alone.engine.generate([prompt for prompt, _ in work], [params for _, params in work])
            answers.append([(answer.token_ids, answer.logprobs) for answer in found])
        return work, answers
    finally:
        alone.close()


def requests(deployment: Deployment, rng: random.Random) -> list[Work]:
    """Prompts with common beginnings, some of them several times; greedy and sampled; of all lengths and priorities."""
    text = "The old man looked at the sea. He had not taken a fish in eighty-four days, and the boy had left him. " * 9
    token_ids = deployment.tokenizer.encode(text)
    beginnings = [token_ids[start : start + 150] for start in (0, 1, 40)]
    chosen: list[Work] = []
    while len(chosen) < NUM_REQUESTS:
        prompt = rng.choice(beginnings)[: rng.randint(1, 150)] + [
            rng.randrange(3, 8000) for _ in range(rng.randint(0, 20))
        ]
        params = SamplingParams(
            max_new_tokens=rng.randint(1, 50),
            do_sample=rng.random() < 0.7,
            temperature=1.0,
            seed=rng.randrange(1000),
            repetition_penalty=rng.choice((1.0, 1.2)),
            logprobs=1,
            priority=rng.randint(0, 2),
            ignore_eos=True,
        )
        num_samples = rng.choice((1, 1, 1, 4))
        chosen += [(prompt, replace(params, seed=(params.seed or 0) + index)) for index in range(num_samples)]
    return chosen[:NUM_REQUESTS]


def test_requests_get_what_each_gets_alone(
    deployment: Deployment, work_and_answers: tuple[list[Work], list[list[Answer]]]
) -> None:
    rng = random.Random(12)
    work, expected = work_and_answers
    deployment.update_weight_mapping(MAPPINGS[0])
    outputs: dict[int, list[RequestOutput]] = {}
    has_ended = Semaphore(0)

    def on_output(output: RequestOutput) -> None:
        outputs.setdefault(output.request_id, []).append(output)
        if output.is_finished:
            has_ended.release()

    def is_in_use() -> bool:
        """Whether a request has begun on the newest version."""
        bound = deployment.engine.status().versions[deployment.version_id]
        usages = [output.usage for parts in list(outputs.values()) for output in list(parts)]
        return bound > 0 or any(usage is not None and usage.version == deployment.version_id for usage in usages)

    ids: list[int] = []
    mapping_of = {deployment.version_id: 0}
    while len(ids) < len(work):
        count = rng.randint(1, 12) if ids else NUM_AT_ONCE
        with deployment.engine.between_steps():
            for prompt, params in work[len(ids) : len(ids) + count]:
                ids.append(deployment.engine.submit(prompt, params, on_output))
        if len(ids) > NUM_AT_ONCE and rng.random() < 0.5:
            continue
        wait_until(is_in_use)  # a change that is quick could otherwise overtake another that nobody has seen
        choice = 1 - mapping_of[deployment.version_id]
        deployment.update_weight_mapping(MAPPINGS[choice])
        mapping_of[deployment.version_id] = choice
    for _ in ids:
        assert has_ended.acquire(timeout=120)
    given: list[list[int]] = [[] for _ in MAPPINGS]  # what each mapping has answered
    found: list[Answer] = []
    for index, request_id in enumerate(ids):
        parts = outputs[request_id]
        assert parts[-1].error is None and parts[-1].usage is not None
        token_ids = tuple(token_id for part in parts for token_id in part.token_ids)
        logprobs = tuple(entry for part in parts for entry in part.logprobs)
        found.append((token_ids, logprobs))
        given[mapping_of[parts[-1].usage.version]].append(index)
    assert all(given)
    for answers, indices in zip(expected, given, strict=True):
        assert [found[index] for index in indices] == [answers[index] for index in indices]
    counts, status = deployment.engine.meter.read().counts, deployment.engine.status()
    assert counts.num_preemptions > 0 and counts.num_prefix_hit_tokens > 0
    guessed = deployment.engine.meter.read().speculation
    assert guessed is None or guessed.num_accepted > 0
    assert status.num_free_blocks == status.num_blocks
