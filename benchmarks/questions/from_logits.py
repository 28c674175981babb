"""The scores of amalgam_endings and amalgam_words out of transformers' logits, and what lm_eval got from a server.

    amalgam serve --model models/demo --inference.dtype float32
    lm_eval run --include_path benchmarks/questions --tasks amalgam_endings --model local-completions --model_args \\
      model=demo,base_url=http://127.0.0.1:8080/v1/completions,tokenizer=models/demo --log_samples --output_path OUT
    lm_eval run --include_path benchmarks/questions --tasks amalgam_words --model local-chat-completions --model_args \\
      model=demo,base_url=http://127.0.0.1:8080/v1/chat/completions --apply_chat_template --log_samples \\
      --output_path OUT
    python benchmarks/questions/from_logits.py --lm-eval OUT

lm_eval runs in this project's folder, in an environment of its own: `pip install "lm_eval[api]==0.4.13" transformers`.
The exit code is 1 if a score or a text differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
DEMO = FOLDER.parents[1] / "models" / "demo"
MAX_NEW_TOKENS = 16  # as amalgam_words.yaml has it
CLOSE = 1e-3  # nats, between two sums of log-probabilities

Row = Mapping[str, Any]


class Model:
    """The demo in float32."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds, which scores alone do not need

        torch.set_num_threads(1)  # the model is small
        self._tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self._model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
        self._end_ids = set(self._model.generation_config.eos_token_id)

    @torch.inference_mode()
    def loglikelihood(self, beginning: str, ending: str) -> float:
        """Of the ending's tokens, as lm_eval cuts them: those that the beginning alone does not have."""
        ids = self._tokenizer.encode(f"{beginning} {ending}")
        start = len(self._tokenizer.encode(beginning))
        scores = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(scores[place - 1, ids[place]] for place in range(start, len(ids))))

    @torch.inference_mode()
    def answer(self, message: str) -> str:
        """The likeliest tokens, one after the other, up to the end of the line."""
        chat = [{"role": "user", "content": message}]
        prompt = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer.encode(prompt)
        start, text = len(ids), ""
        while len(ids) - start < MAX_NEW_TOKENS and "\n" not in text:
            token_id = int(self._model(torch.tensor([ids])).logits[0, -1].argmax())
            if token_id in self._end_ids:
                break
            ids.append(token_id)
            text = self._tokenizer.decode(ids[start:], skip_special_tokens=True)
        return text.partition("\n")[0]


def score_endings(sums: Sequence[Sequence[float]], questions: Sequence[Row]) -> dict[str, float]:
    """acc by the greatest sum, acc_norm by the greatest sum for each character."""
    right = {"acc": 0, "acc_norm": 0}
    for row, question in zip(sums, questions, strict=True):
        by_character = [value / len(ending) for value, ending in zip(row, question["endings"], strict=True)]
        right["acc"] += row.index(max(row)) == question["answer"]
        right["acc_norm"] += by_character.index(max(by_character)) == question["answer"]
    return {name: count / len(questions) for name, count in right.items()}


def score_words(texts: Sequence[str], questions: Sequence[Row]) -> float:
    """The share of answers that begin with the word that comes next."""
    wanted = [question["endings"][question["answer"]].split(" ")[0] for question in questions]
    found = [re.search("[^ ]+", text) for text in texts]
    return sum(match is not None and match[0] == word for match, word in zip(found, wanted, strict=True)) / len(wanted)


def shown(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def samples(folder: Path, task: str) -> Iterator[Row]:
    """What lm_eval wrote about a task the last time, in the order of the questions."""
    file = max(folder.rglob(f"samples_{task}_*.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    yield from sorted(rows, key=lambda row: row["doc_id"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lm-eval", type=Path, metavar="FOLDER", help="its --output_path, to be compared with")
    options = parser.parse_args()
    questions = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    model = Model()
    sums = [[model.loglikelihood(row["beginning"], ending) for ending in row["endings"]] for row in questions]
    texts = [model.answer(row["beginning"]) for row in questions]
    scores = {**score_endings(sums, questions), "exact_match": score_words(texts, questions)}
    print(f"from logits:             {shown(scores)}, {len(questions)} questions")
    if options.lm_eval is None:
        return 0
    endings, words = (list(samples(options.lm_eval, task)) for task in ("amalgam_endings", "amalgam_words"))
    found = {name: sum(row[name] for row in endings) / len(endings) for name in ("acc", "acc_norm")}
    found["exact_match"] = sum(row["exact_match"] for row in words) / len(words)
    theirs = [[float(choice[0][0]) for choice in row["resps"]] for row in endings]
    most = max(abs(a - b) for own, other in zip(sums, theirs, strict=True) for a, b in zip(own, other, strict=True))
    differing = sum(row["resps"][0][0] != text for row, text in zip(words, texts, strict=True))
    print(f"lm_eval and the server:  {shown(found)}")
    print(f"sums of log-probabilities differ by {most:.1e} at most; generated texts that differ: {differing}")
    return int(found != scores or most > CLOSE or differing > 0)


if __name__ == "__main__":
    sys.exit(main())
