"""`/v1/models`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import httpx
import pytest

from tests.lazy import Lazy
from tests.server.openai.conftest import MAX_TOKENS

openai = Lazy("openai")


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["demo", "gpt-demo"]
    assert {model.max_model_len for model in models} == {MAX_TOKENS}  # type: ignore[attr-defined]
    assert client.models.retrieve("gpt-demo").id == "gpt-demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_there_and_back(http: httpx.Client) -> None:
    for text in ("Hello, wörld! 床前明月光 🦙", "<|im_start|>x<|im_end|>", " a "):
        answer = http.post("/tokenize", json={"model": "demo", "prompt": text, "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == MAX_TOKENS
        back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
        assert back == {"prompt": text, "content": text}


def test_as_llama_server_has_it(http: httpx.Client) -> None:
    text = "Hello, wörld! 床前明月光 🦙"
    token_ids = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert http.post("/tokenize", json={"content": text}).json() == {"tokens": token_ids}
    pieces = http.post("/tokenize", json={"content": text, "with_pieces": True, "parse_special": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == token_ids
    spelled = [piece["piece"] for piece in pieces]
    assert b"".join(one.encode() if isinstance(one, str) else bytes(one) for one in spelled).decode() == text
    assert http.post("/tokenize", json={"content": ""}).json() == {"tokens": []}


def test_texts_longer_than_the_context_are_counted(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "night " * 3000}).json()
    assert answer["count"] > MAX_TOKENS


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "prompt"),
        ("/tokenize", {"prompt": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"content": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"content": "a", "parse_special": False}, "parse_special"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [0] * 300_000}, "tokens"),
    ],
)
def test_what_is_refused(http: httpx.Client, path: str, body: object, param: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
