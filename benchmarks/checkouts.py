"""Two checkouts of this project in turns, as ratios: whether a change has made anything faster or slower.

    git clone . ../before && git -C ../before checkout COMMIT && make -C ../before setup
    python benchmarks/checkouts.py ../before . --weights int4 mixed
    python benchmarks/checkouts.py ../before . --shape gpt-oss --weights int4 --rounds 9

A round starts a process of each checkout, run by `ROOT/.venv/bin/python`, asks one after the other scenario by
scenario, and ends both, so that a disturbance of the machine and a lucky place in memory hit no side alone; the order
alternates. Figures are the second checkout's speed to the first one's (above 1: it is faster): the median of the
rounds' ratios, with the least and the greatest. For shape S, each checkout's own `overhead.py` tells what a step costs
outside the extension. Prints a table and, as the last line, one JSON object. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

from contestants.shapes import SHAPES
from engines import Child, Contestant, Engine, exit_on_signals, running
from rich.console import Console
from rich.table import Table

from amalgam.tools.bench import hardware

SCENARIOS = (("prompt", 128), ("prompt", 512), ("decode", 1), ("decode", 8), ("decode", 16))
T = TypeVar("T")
OVERHEAD_SEQUENCES, OVERHEAD_STEPS = ("1", "16"), "100"


@dataclass
class Timings:
    """One scenario's seconds, a pair for each round: the first checkout's and the second's."""

    shape: str
    weights: str
    scenario: str
    seconds: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """How many times faster the second one is."""
        return [first / second for first, second in self.seconds]


def compare(roots: Sequence[Path], shape: str, weights: str, rounds: int, folder: Path) -> list[Timings]:
    """Seconds by scenario."""
    found = {scenario: Timings(shape, weights, f"{scenario[0]} {scenario[1]}") for scenario in SCENARIOS}
    engines = {
        str(index): Engine("with_checkout.py", environment=f"{root}/.venv", options=(str(root), shape, weights))
        for index, root in enumerate(roots)
    }
    for round_ in range(rounds):
        with running(dict(_in_turn(list(engines.items()), round_)), folder) as contestants:
            for is_warm in (False, True):
                for turn, scenario in enumerate(SCENARIOS, round_):
                    seconds = _ask(contestants, scenario, turn)
                    if is_warm:
                        found[scenario].seconds.append(seconds)
    return list(found.values())


def _ask(contestants: dict[str, Contestant], scenario: tuple[str, int], turn: int) -> tuple[float, float]:
    asked = {name: contestant.ask(*scenario) for name, contestant in _in_turn(list(contestants.items()), turn)}
    return asked["0"], asked["1"]


def _in_turn(items: list[T], turn: int) -> list[T]:
    return items[::-1] if turn % 2 else items


def compare_overhead(roots: Sequence[Path], weights: str, rounds: int, folder: Path) -> list[Timings]:
    """Seconds that a step of shape S spends outside the extension, as each checkout's own script measures them."""
    found = {count: Timings("S", weights, f"outside {count}") for count in OVERHEAD_SEQUENCES}
    if not all((root / "benchmarks/overhead.py").exists() for root in roots):
        return []
    for round_ in range(rounds):
        measured = {root: _overhead(root, weights, folder) for root in _in_turn(list(roots), round_)}
        for count, timings in found.items():
            first, second = (measured[root][int(count)] for root in roots)
            timings.seconds.append((first, second))
    return list(found.values())


def _overhead(root: Path, weights: str, folder: Path) -> dict[int, float]:
    log = folder / "overhead.log"
    script = [str(root / ".venv/bin/python"), str(root / "benchmarks/overhead.py"), "--weights", weights]
    options = ["--sequences", *OVERHEAD_SEQUENCES, "--steps", OVERHEAD_STEPS]
    child = Child([*script, *options], log, has_pipes=True)
    try:
        output, _ = child.process.communicate()
    finally:
        child.close()
    if child.process.returncode:
        raise RuntimeError(f"{root}/benchmarks/overhead.py: {log.read_text()[-2000:]}")
    results = json.loads(output.splitlines()[-1])["results"]
    return {result["sequences"]: result["outside_microseconds"] * 1e-6 for result in results}


def table(timings: Sequence[Timings]) -> Table:
    drawn = Table(title="The second checkout against the first: above 1, it is faster")
    for column in ("shape", "weights", "scenario"):
        drawn.add_column(column)
    for column in ("ratio", "range", "first ms", "second ms"):
        drawn.add_column(column, justify="right")
    for row in timings:
        ratios = row.ratios
        milliseconds = [f"{median(pair[side] for pair in row.seconds) * 1e3:.2f}" for side in (0, 1)]
        spread = f"{min(ratios):.3f}–{max(ratios):.3f}"
        drawn.add_row(row.shape, row.weights, row.scenario, f"{median(ratios):.3f}", spread, *milliseconds)
    return drawn


def commit(root: Path) -> str:
    """The checked-out commit, with a + if files have been changed since; empty outside a repository."""
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def checkout(text: str) -> Path:
    """A checkout's folder.

    Raises:
        ArgumentTypeError: it has no environment.
    """
    root = Path(text).resolve()
    if not (root / ".venv/bin/python").exists():
        raise argparse.ArgumentTypeError(f"{root} has no .venv/bin/python; `make setup` there makes it")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=checkout, help="a checkout with its .venv")
    parser.add_argument("second", type=checkout)
    parser.add_argument("--shape", nargs="+", choices=("S", *SHAPES), default=["S"])
    parser.add_argument("--weights", nargs="+", default=["int4"], help="as `amalgam bench --shape S` takes them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-overhead", action="store_true")
    arguments = parser.parse_args()
    exit_on_signals()
    roots = (arguments.first, arguments.second)
    timings: list[Timings] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shape:
            for weights in arguments.weights:
                timings += compare(roots, shape, weights, arguments.rounds, Path(folder))
                if shape == "S" and not arguments.without_overhead:
                    timings += compare_overhead(roots, weights, arguments.rounds, Path(folder))
    Console().print(table(timings))
    document = {
        "command": sys.argv,
        "commits": [commit(root) for root in roots],
        "hardware": hardware(),
        "results": [asdict(row) | {"ratio": median(row.ratios)} for row in timings],
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
