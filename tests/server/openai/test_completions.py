"""`/v1/completions`, by OpenAI's client, and its scores against those of transformers."""

from __future__ import annotations

import base64
import io
import math
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.lazy import Lazy
from tests.server.openai.conftest import DEMO

openai = Lazy("openai")

PROMPT = "It was a dark night, and"
QUESTION = ("The colour of the sky is", [" blue", " the same as that of", " seven."])


@cache
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def reference_logprobs(token_ids: list[int]) -> torch.Tensor:
    """`[tokens - 1, vocabulary]`: row i is about token i + 1."""
    with torch.inference_mode():
        logits = reference()(torch.tensor([token_ids])).logits[0, :-1]
    scores: torch.Tensor = logits.float().log_softmax(dim=-1)
    return scores


def encode(http: httpx.Client, text: str) -> list[int]:
    token_ids: list[int] = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return token_ids


def test_a_completion_is_what_the_native_interface_generates(client: openai.OpenAI, http: httpx.Client) -> None:
    native = http.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 12, "temperature": 0}).json()
    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0)
    assert completion.choices[0].text == native["generated_text"]
    assert completion.choices[0].finish_reason == native["finish_reason"]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == native["prompt_tokens"]
    assert completion.usage.total_tokens == native["total_tokens"]
    assert completion.model == "demo"
    assert completion.system_fingerprint is not None
    assert completion.system_fingerprint.endswith(f"weights-{native['weight_version']}")
    assert len(client.completions.create(model="demo", prompt=PROMPT).choices[0].text.split()) <= 16
    assert client.completions.create(model="gpt-demo", prompt=PROMPT, max_tokens=1).model == "demo"


def test_samples_have_seeds_of_their_own_and_come_again(client: openai.OpenAI) -> None:
    def sample(**fields: Any) -> list[str]:
        completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=8, **fields)
        assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
        return [choice.text for choice in completion.choices]

    three = sample(n=3, seed=7)
    assert len(set(three)) == 3
    assert sample(n=3, seed=7, best_of=3) == three
    assert [sample(seed=seed)[0] for seed in (7, 8, 9)] == three


def test_prompts_of_every_kind(client: openai.OpenAI, http: httpx.Client) -> None:
    token_ids = encode(http, PROMPT)
    texts = []
    for prompt in (PROMPT, [PROMPT, "x"], token_ids, [token_ids, [5]]):
        completion = client.completions.create(model="demo", prompt=prompt, max_tokens=6, temperature=0, n=2)
        assert len(completion.choices) == (4 if prompt in ([PROMPT, "x"], [token_ids, [5]]) else 2)
        texts.append({choice.text for choice in completion.choices[:2]})
    assert all(text == texts[0] and len(text) == 1 for text in texts)


@pytest.mark.parametrize(
    "stream_options", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_a_stream_is_the_whole(client: openai.OpenAI, stream_options: Any) -> None:
    fields: dict[str, Any] = {
        "prompt": [PROMPT, "One"],
        "max_tokens": 9,
        "n": 2,
        "seed": 3,
        "logprobs": 2,
        "echo": True,
    }
    whole = client.completions.create(model="demo", **fields)
    chunks: list[Any] = list(
        client.completions.create(model="demo", stream=True, stream_options=stream_options, **fields)
    )
    usage_chunks = [chunk for chunk in chunks if not chunk.choices]
    assert len(usage_chunks) == (0 if stream_options is None else 1)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == choice.index]
        assert "".join(item.text for item in mine) == choice.text
        assert [item.finish_reason for item in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [value for item in mine if item.logprobs for value in getattr(item.logprobs, name)]
            assert parts == getattr(choice.logprobs, name)
    if stream_options is not None:
        assert usage_chunks[0].usage == whole.usage
        has_usage = [chunk.usage is not None for chunk in chunks[:-1]]
        assert all(has_usage) if "continuous_usage_stats" in stream_options else not any(has_usage)


def test_an_echo_has_the_models_own_logprobs(client: openai.OpenAI, http: httpx.Client) -> None:
    completion = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=4,
        temperature=0,
        echo=True,
        logprobs=3,
        extra_body={"return_token_ids": True},
    )
    [choice] = completion.choices
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:index])) for index in range(len(logprobs.tokens))]
    token_ids = encode(http, PROMPT) + choice.token_ids  # type: ignore[attr-defined]
    golden = reference_logprobs(token_ids)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    expected = [row[token_id].item() for row, token_id in zip(golden, token_ids[1:], strict=True)]
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=0.02)
    for row, top in zip(golden, logprobs.top_logprobs[1:], strict=True):
        assert 3 <= len(top) <= 4
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(row.topk(3).values.tolist(), abs=0.02)


def test_a_multiple_choice_score_is_the_one_computed_from_logits(client: openai.OpenAI, http: httpx.Client) -> None:
    """The requests and the reading of the answers are those of `lm_eval --model local-completions`."""
    context, endings = QUESTION
    context_ids = encode(http, context)
    prompts = [context_ids + encode(http, ending) for ending in endings]
    answer = http.post(
        "/v1/completions",
        json={
            "model": "demo",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ).json()
    scores, are_greedy = [], []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        token_logprobs = choice["logprobs"]["token_logprobs"][len(context_ids) : -1]
        top_logprobs = choice["logprobs"]["top_logprobs"][len(context_ids) : -1]
        scores.append(sum(token_logprobs))
        are_greedy.append(all(own == max(top.values()) for own, top in zip(token_logprobs, top_logprobs, strict=True)))
    for prompt, score, is_greedy in zip(prompts, scores, are_greedy, strict=True):
        golden = reference_logprobs(prompt)[len(context_ids) - 1 :]
        ending = torch.tensor(prompt[len(context_ids) :])
        assert score == pytest.approx(golden.gather(1, ending[:, None]).sum().item(), abs=0.02)
        assert is_greedy == bool((golden.argmax(dim=1) == ending).all())


def test_max_tokens_0_only_scores(client: openai.OpenAI, http: httpx.Client) -> None:
    [choice] = client.completions.create(model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1).choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(encode(http, PROMPT))
    answer = http.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 0, "prompt_logprobs": 2}
    ).json()  # fmt: skip
    first, *others = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    scored = [next(iter(entry.values()))["logprob"] for entry in others]
    assert scored == pytest.approx(choice.logprobs.token_logprobs[1:])
    assert all({item["rank"] for item in entry.values()} >= {1, 2} for entry in others)


def test_what_ends_an_answer(client: openai.OpenAI) -> None:
    def first(**fields: Any) -> Any:
        options = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        return client.completions.create(**{**options, **fields}).choices[0]

    text = first().text
    stop = text[4:7]
    cut = first(stop=stop)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[: text.index(stop)], "stop", stop)
    kept = first(stop=[stop], extra_body={"include_stop_str_in_output": True})
    assert kept.text == text[: text.index(stop)] + stop
    token_ids = first(extra_body={"return_token_ids": True}).token_ids
    by_token = first(extra_body={"stop_token_ids": [token_ids[3]]})
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token_ids[3])
    assert first(logit_bias={str(token_ids[0]): -100}).text != text
    names = first(logprobs=0, extra_body={"return_tokens_as_token_ids": True}).logprobs.tokens
    assert names == [f"token_id:{token_id}" for token_id in token_ids]


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, r"yes|no"),
        ({"guided_regex": r"[0-9]{3}"}, r"[0-9]{3}"),
        ({"guided_grammar": 'start: "a" ("b" | "c") "d"'}, r"a[bc]d"),
        ({"structured_outputs": {"regex": "x[yz]x"}}, r"x[yz]x"),
        ({"structured_outputs": {"json": {"enum": ["a", 1]}}}, r'"a"|1'),
        ({"guided_json": '{"const": 7}'}, r"7"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": True}}}},
            r"true",
        ),
    ],
)
def test_answers_have_the_form_that_is_asked_for(client: openai.OpenAI, field: dict[str, Any], pattern: str) -> None:
    import re

    for choice in client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, n=3, extra_body=field).choices:
        assert re.fullmatch(pattern, choice.text), choice.text
        assert choice.finish_reason == "stop"


def test_routed_experts_are_an_array(client: openai.OpenAI, http: httpx.Client) -> None:
    completion = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=5, n=2, extra_body={"routed_experts": True}
    )
    info = http.get("/model_info").json()
    for choice in completion.choices:
        array = np.load(io.BytesIO(base64.b64decode(choice.routed_experts)), allow_pickle=False)  # type: ignore[attr-defined]
        assert completion.usage is not None
        assert array.shape[0] == completion.usage.prompt_tokens + 5 - 1
        assert array.shape[2] == 4
        assert 0 <= array.min() and array.max() < info["sizes"]["experts_per_layer"]


def test_logprobs_are_probabilities(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model="demo", prompt=PROMPT, max_tokens=3, logprobs=20, seed=1).choices
    assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
    for top in choice.logprobs.top_logprobs:
        assert 0.2 < sum(map(math.exp, top.values())) <= 1.0001
