"""What is re-mapped, and under which load.

In: a configuration with several sources of one model. Out: servers, random changes, questions, clients. Must never know
what is shown.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from remapping.live import LiveServer, Question, StreamedAnswer

from amalgam.config.placement import BASE_SOURCE
from amalgam.config.reading import load_settings
from amalgam.config.settings import Settings

DERIVED: Mapping[str, dict[str, Any]] = {
    "fp8": {"format": "fp8", "scale": "block"},
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "group_size": 128},
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.\w+\.weight")
PROJECTION = re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight")
BEGINNING = "The old man looked at the sea. The sea was calm, and the boat lay still. "
ENDINGS = (
    "The old man looked at",
    "明月几时有，把酒问青天。不知天上宫阙，",
    "def main(argv):\n    for name in argv:\n        print(name)\n    for name in",
    "import os\nimport sys\nimport os\nimport",
)
QUESTIONS = [
    Question(BEGINNING * (index % 3) + ENDINGS[index % len(ENDINGS)], 16 + 8 * (index % 8), index, index % 2 == 0)
    for index in range(32)
]
MOST_TOKENS = 384  # of those, prompt and answer
LONG_TOKENS = 4096
MOST_NAMES = 8  # weights that one random change names at most

Change = dict[str, str]  # name → source


@dataclass(frozen=True)
class Bench:
    """What is served, and how.

    Attributes:
        config: with all sources, every weight from the base.
        flags: of every server.
    """

    config: Path
    folder: Path
    flags: tuple[str, ...]
    num_streams: int
    rng: random.Random

    @contextmanager
    def serving(self, max_tokens: int, *flags: str) -> Iterator[LiveServer]:
        sizes = f"--inference.max_seq_length {max_tokens} --inference.max_batch_size {self.num_streams + 1}".split()
        server = LiveServer(self.config, self.folder / "server.log", [*sizes, *self.flags, *flags])
        try:
            yield server
        finally:
            server.close()

    def settings(self, mapping: Mapping[str, str], **overrides: Any) -> Settings:
        """Of a deployment in this process, under the rules of a version."""
        config = yaml.safe_load(self.config.read_text())
        config["model"]["mixed_precision"]["weight_mapping"] = dict(mapping)
        path = self.folder / "offline.yaml"
        path.write_text(yaml.safe_dump(config))
        flags = zip(self.flags[::2], self.flags[1::2], strict=True)
        given = {name.removeprefix("--"): yaml.safe_load(value) for name, value in flags}
        return load_settings(path, {**given, **overrides}, {})


@dataclass(frozen=True)
class Weights:
    """Names of the weights that are moved."""

    experts: Mapping[int, Sequence[Sequence[str]]]  # layer → each expert's projections
    projections: Sequence[str]
    sources: Sequence[str]

    @classmethod
    def of(cls, server: LiveServer, sources: Sequence[str]) -> Weights:
        experts: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        names = [weight["name"] for weight in server.ask("/manifest")["weights"]]
        for name in names:
            if found := EXPERT.fullmatch(name):
                experts[int(found[1])][int(found[2])].append(name)
        if not experts:
            raise SystemExit("The model has no experts that are called model.layers.*.mlp.experts.*.")
        found_experts = {layer: list(each.values()) for layer, each in experts.items()}
        return cls(found_experts, [name for name in names if PROJECTION.fullmatch(name)], sources)

    def any_change(self, rng: random.Random) -> Change:
        """Up to `MOST_NAMES` names: whole experts, single projections of experts and of attention."""
        change: Change = {}
        for _ in range(rng.randint(1, MOST_NAMES // 3)):
            expert = self.any_expert(rng)
            names = rng.choice((expert, [rng.choice(expert)], [rng.choice(self.projections)]))
            change.update(dict.fromkeys(names, rng.choice(self.sources)))
        return change

    def any_expert(self, rng: random.Random) -> Sequence[str]:
        return rng.choice(self.experts[rng.choice(list(self.experts))])

    def any_layer(self, rng: random.Random) -> Sequence[str]:
        """All experts of a layer."""
        return [name for expert in self.experts[rng.choice(list(self.experts))] for name in expert]

    def in_turn(self, rng: random.Random, choose: Callable[[], Sequence[str]]) -> Iterator[Change]:
        """Changes that always change something: names that come from another source than before."""
        now: dict[str, str] = {}
        while True:
            names = choose()
            source = rng.choice([source for source in self.sources if source != now.get(names[0], BASE_SOURCE)])
            change = dict.fromkeys(names, source)
            now |= change
            yield change


@asynccontextmanager
async def clients(
    server: LiveServer, count: int, questions: Callable[[], Question]
) -> AsyncIterator[list[StreamedAnswer]]:
    """So many clients, each of which asks anew when its answer has ended; the answers so far, in order of their end.

    Raises:
        RuntimeError: an answer has failed.
    """
    answers: list[StreamedAnswer] = []
    is_over = False

    async def client() -> None:
        while not is_over:
            answers.append(await server.stream(questions()))

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(client())
        yield answers
        is_over = True


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 – of tasks that a failure ends together with this one
        await asyncio.sleep(0.001)


async def ask_each(server: LiveServer) -> None:
    await asyncio.gather(*(server.stream(question) for question in QUESTIONS[:16]))
