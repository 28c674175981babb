"""Files of requests that are killed on the way, and texts longer than any model's context.

    python benchmarks/offline.py [--config config/model_config.yaml] [--text heldout-en.json heldout-zh.json]

    lines    `amalgam generate --input` over prompts, chat requests and lines that cannot be read: once undisturbed, and
             once killed (`kill -9`) behind a third and two thirds of the answers; how many lines of the two differ
    texts    `amalgam summarize` of the first so many tokens of each text: characters that no chunk has, seconds that
             the chunks take with one new token each, at half the length and the whole one, and whether summaries repeat
             what was asked for

Texts are files of one text, or of a JSON list of them; without any, those of this repository in English and Chinese.
Prints tables and, as the last line, one JSON object. The exit code is 1 if a line differs or a character is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines import Child, exit_on_signals
from rich.console import Console
from rich.table import Table

from amalgam.config.reading import load_settings
from amalgam.evaluation.texts import read_texts
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware
from amalgam.tools.journal import partial_of

ROOT = Path(__file__).resolve().parents[1]
AMALGAM = Path(sys.executable).with_name("amalgam")
SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
TIMES = ("created", "created_at", "completed_at")  # of the run's beginning


def lines_of(count: int, texts: Sequence[str], rng: random.Random) -> list[str]:
    """A third of chat requests, a hundredth of lines that cannot be read, prompts of 20 to 200 characters."""
    lines = []
    for index in range(count):
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 200))
        prompt, num_tokens = text[start : start + rng.randint(20, 200)], rng.randint(4, 40)
        if index % 100 == 50:
            lines.append(rng.choice(("", "{broken", '{"url": "/v1/files"}')))
        elif index % 3 == 0:
            body = {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": num_tokens}
            lines.append(json.dumps({"custom_id": f"{index}", "url": "/v1/chat/completions", "body": body}))
        else:
            lines.append(json.dumps({"prompt": prompt, "max_new_tokens": num_tokens}))
    return lines


def answers_of(path: Path) -> list[Any]:
    """Each line, but for the time that its run began."""
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    for answer in answers:
        for name in TIMES:
            ((answer.get("response") or {}).get("body") or {}).pop(name, None)
    return answers


def show_lines(config: Path, folder: Path, texts: Sequence[str], count: int) -> dict[str, Any]:
    source = folder / "lines.jsonl"
    source.write_text("\n".join(lines_of(count, texts, random.Random(0))) + "\n")

    def command(name: str) -> list[str | Path]:
        return [AMALGAM, "generate", "--config", config, "--input", source, "--output", folder / name, "--seed", "7"]

    began = time.perf_counter()
    subprocess.run(command("whole"), check=True, **SILENT)
    seconds = time.perf_counter() - began
    partial, killed_at = partial_of(folder / "killed"), []
    for share in (1 / 3, 2 / 3):
        child = Child(command("killed"), folder / "killed.log")
        while not (partial.exists() and partial.read_bytes().count(b"\n") > share * count):
            if not child.is_running:
                raise RuntimeError((folder / "killed.log").read_text(errors="replace")[-2000:])
            time.sleep(0.01)
        child.process.kill()
        child.close()
        killed_at.append(partial.read_bytes().count(b"\n"))
    subprocess.run(command("killed"), check=True, **SILENT)
    whole, killed = answers_of(folder / "whole"), answers_of(folder / "killed")
    return {
        "lines": len(whole),
        "errors": sum(answer["error"] is not None for answer in whole),
        "seconds_undisturbed": seconds,
        "killed_behind_lines": killed_at,
        "differing": abs(len(whole) - len(killed)) + sum(a != b for a, b in zip(whole, killed, strict=False)),
    }


def summarized(config: Path, path: Path, num_tokens: int) -> dict[str, Any]:
    command: list[str | Path] = [AMALGAM, "summarize", path, "--config", config, "--json"]
    done = subprocess.run(
        [*command, "--max-summary-tokens", str(num_tokens)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def show_text(
    config: Path, folder: Path, name: str, text: str, tokenizer: Tokenizer, num_tokens: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"text": name, "characters": 0, "tokens": 0, "chunks": 0, "characters_lost": 0}
    path = folder / "text.txt"
    for share in (2, 1):
        ids = tokenizer.encode(text)[: num_tokens // share]
        part = tokenizer.decode(ids)
        path.write_text(part)
        answer = summarized(config, path, 1)
        covered = 0
        for chunk in answer["chunks"]:
            row["characters_lost"] += max(0, chunk["start"] - covered)
            covered = max(covered, chunk["end"])
        row["characters_lost"] += len(part) - covered
        row[f"chunk_ms_of_{len(answer['chunks'])}"] = answer["timings"]["chunk_seconds"] / len(answer["chunks"]) * 1e3
    row |= {"characters": len(part), "tokens": answer["document_tokens"], "chunks": len(answer["chunks"])}
    answer = summarized(config, path, 60)
    asked = [part[chunk["start"] : chunk["end"]] for chunk in answer["chunks"]]
    row["summaries_with_their_prompt"] = sum(
        text in chunk["summary"] for text, chunk in zip(asked, answer["chunks"], strict=True)
    )
    row["generated_tokens"] = answer["generated_tokens"]
    row["seconds_with_merges"] = answer["timings"]["total_seconds"]
    return row


def repository_texts() -> dict[str, str]:
    english = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))
    chinese = (ROOT / "README.zh-CN.md").read_text("utf-8")
    return {"english": english, "chinese": chinese}


def print_row(console: Console, row: dict[str, Any]) -> None:
    table = Table(show_header=False, show_edge=False)
    for name, value in row.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "config/model_config.yaml")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--shows", nargs="+", choices=("lines", "texts"), default=("lines", "texts"))
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text, at most")
    arguments = parser.parse_args()
    exit_on_signals()
    os.chdir(ROOT)
    console = Console()
    texts = {Path(file).stem: "\n".join(one.text for one in read_texts([file])) for file in arguments.text}
    texts = texts or repository_texts()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "lines" in arguments.shows:
            found["lines"] = show_lines(arguments.config, folder, list(texts.values()), arguments.lines)
            print_row(console, found["lines"])
        if "texts" in arguments.shows:
            tokenizer = Tokenizer.load(Path(load_settings(arguments.config, {}, {}).model.base_path))
            found["texts"] = []
            for name, text in texts.items():
                found["texts"].append(show_text(arguments.config, folder, name, text, tokenizer, arguments.tokens))
                print_row(console, found["texts"][-1])
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), **found}))
    is_lost = any(row["characters_lost"] or row["summaries_with_their_prompt"] for row in found.get("texts", ()))
    return 1 if is_lost or found.get("lines", {}).get("differing") else 0


if __name__ == "__main__":
    sys.exit(main())
