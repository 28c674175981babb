"""Questions of three choices out of this project's own documents: how does a sentence end?

python benchmarks/questions/make_questions.py        writes questions.jsonl, which is kept: documents change
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
COUNT, CHOICES = 48, 3
SENTENCE = re.compile(r"[A-Z][A-Za-z,;: '()-]{69,139}\.")


def sentences() -> Iterator[str]:
    """Those of plain words, of the length of a line or two."""
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            for sentence in re.split(r"(?<=[.!?]) ", " ".join(paragraph.split())):
                if SENTENCE.fullmatch(sentence):
                    yield sentence


def halves(sentence: str) -> tuple[str, str]:
    """Cut at the space that is next to the middle."""
    middle = min((match.start() for match in re.finditer(" ", sentence)), key=lambda at: abs(at - len(sentence) // 2))
    return sentence[:middle], sentence[middle + 1 :]


def main() -> None:
    rng = random.Random(0)
    pairs = [halves(sentence) for sentence in rng.sample(list(dict.fromkeys(sentences())), COUNT)]
    with (FOLDER / "questions.jsonl").open("w", encoding="utf-8") as file:
        for beginning, ending in pairs:
            others = rng.sample([other for _, other in pairs if other != ending], CHOICES - 1)
            endings = rng.sample([ending, *others], CHOICES)
            row = {"beginning": beginning, "endings": endings, "answer": endings.index(ending)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
