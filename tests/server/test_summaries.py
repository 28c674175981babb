"""`POST /summarize` and `amalgam summarize`: the whole document is asked about, and new text answered."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from amalgam.cli import main
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.core import Engine
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from amalgam.server.local import LocalServer
from amalgam.text import pieces
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO

ENGLISH = "The old man looked at the sea. He had been there for 17 years, and knew every one of its tides. " * 20
CHINESE = "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。" * 20
SIZES = {"chunk_tokens": 120, "overlap_tokens": 20, "max_summary_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def settings() -> Settings:
    server = {"max_batch_prompts": 40, "api_keys": ["a-key-of-somebody"], "admin_key": "another-key"}
    model = {"model": {"base_path": str(DEMO)}, "inference": {"max_seq_length": 512, "max_batch_size": 8}}
    return build_settings({**model, "engine": {"num_threads": 1}, "server": server})


@pytest.fixture(scope="module")
def deployment(settings: Settings) -> Iterator[Deployment]:
    deployment = open_deployment(settings)
    yield deployment
    deployment.close()


def ask(deployment: Deployment, settings: Settings, **body: Any) -> tuple[int, Any]:
    async def run() -> tuple[int, Any]:
        server = LocalServer(deployment, settings)
        await server.start()
        return await server.post("/summarize", body)

    return asyncio.run(run())


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_every_chunk_is_asked_about_and_only_new_text_is_answered(
    text: str, deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    submit = Engine.submit

    def watched(engine: Engine, ids: Any, *more: Any) -> int:
        prompts.append(deployment.tokenizer.decode(ids))
        return submit(engine, ids, *more)

    monkeypatch.setattr(Engine, "submit", watched)
    status, answer = ask(deployment, settings, text=text, **SIZES)
    assert status == 200
    assert answer["language"] == ("en" if text == ENGLISH else "zh")
    chunks, num_tokens = answer["chunks"], answer["document_tokens"]
    assert num_tokens == len(deployment.tokenizer.encode(text)) and len(chunks) == 1 + -(-(num_tokens - 120) // 100)
    assert chunks[0]["start"] == 0 and chunks[-1]["end"] == len(text)
    assert all(before["start"] < after["start"] < before["end"] for before, after in pairwise(chunks))
    for chunk in chunks:
        assert sum(text[chunk["start"] : chunk["end"]] in prompt for prompt in prompts) >= 1
    assert answer["merges"] >= 1 and len(prompts) > len(chunks)
    assert answer["generated_tokens"] <= 12 * len(prompts) and answer["prompt_tokens"] > num_tokens
    assert answer["summary"] and not any(answer["summary"] in prompt for prompt in prompts)
    again = ask(deployment, settings, text=text, weights=deployment.version_id, **SIZES)[1]
    assert answer == again | {"timings": answer["timings"]}
    assert ask(deployment, settings, text=text, weights="nobody", **SIZES)[0] == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"overlap_tokens": 120}, "overlap_tokens"),
        ({"chunk_tokens": 8}, "chunk_tokens"),
        ({"chunk_tokens": 505}, "chunk_tokens"),
        ({"max_summary_tokens": 200}, "max_summary_tokens"),  # of which two are too long for a prompt
        ({"text": " \n"}, "text"),
        ({"text": ENGLISH * 10, "chunk_tokens": 20, "overlap_tokens": 19}, "text"),
        ({"stream": True}, "stream"),
        ({"language": "fr"}, "language"),
    ],
)
def test_what_does_not_fit_is_named(
    body: dict[str, Any], param: str, deployment: Deployment, settings: Settings
) -> None:
    status, answer = ask(deployment, settings, **{"text": ENGLISH, **SIZES, **body})
    assert (status, answer["error"]["param"]) == (422, param)


def test_a_text_of_too_many_chunks_is_not_read_to_its_end(
    deployment: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_pieces = 0
    read = Tokenizer.token_starts_by_piece

    def watched(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
        nonlocal num_pieces
        for piece in read(tokenizer, text):
            num_pieces += 1
            yield piece

    monkeypatch.setattr(Tokenizer, "token_starts_by_piece", watched)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 4096)
    monkeypatch.setattr(pieces, "OVERLAP_CHARS", 512)
    status, answer = ask(deployment, settings, text=ENGLISH * 60, **SIZES)
    assert (status, answer["error"]["param"]) == (422, "text")
    assert num_pieces < len(ENGLISH * 60) / 4096 / 2


class _Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    text = ENGLISH[:900]
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    flags += ["--model", str(DEMO), "--inference.max_seq_length", "512"]
    assert main(["summarize", str(file), *flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["chunks"][-1]["end"] == len(text)
    monkeypatch.setattr("sys.stdin", _Stdin(text.encode()))
    assert main(["summarize", "-", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == answer["summary"] + "\n" and "chunks" in captured.err
    file.write_bytes(b"half \xe6\x9c")
    huge = ["--max-summary-tokens", str(10**20)]
    for arguments in (
        [str(file)], [str(tmp_path / "nowhere")], [str(file), "--overlap-tokens", "120"], [str(file), *huge]
    ):  # fmt: skip
        assert main(["summarize", *arguments, "--chunk-tokens", "120", "--model", str(DEMO)]) == 2
    err = capsys.readouterr().err
    assert "byte 6" in err and "nowhere" in err and "overlap_tokens is 120" in err
    file.write_bytes(b" \n")
    assert main(["summarize", str(file), "--model", str(DEMO)]) == 2
