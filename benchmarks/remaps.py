"""Changes of precision while clients stream: are answers whole, what do clients feel, what does it cost?

    python benchmarks/remaps.py [--model models/demo] [--source int4=FOLDER ...] [--shows exact pause …]

One server with a source each for bf16 (the model itself), fp8, int8 and int4; those that no `--source` names are made
beside the configuration in `--folder`. What is shown:

    exact    clients stream while random experts and projections move among the sources. Every answer is compared with
             that of a deployment that was opened with the rules of the version that it names and runs nothing else:
             one request at a time, no shared prefixes, no guesses. Once as it is, once with a KV cache so small that
             requests are preempted, and with guessed tokens. Memory before and after, under the same rules.
    pause    gaps between the tokens of streams while one expert, and while a layer's experts, are re-mapped, beside
             those in between; then of clients that ask anew all the time, until the version before is drained
    memory   the most that a re-map of many weights takes, and what is left of it
    first    seconds from the request of a re-map of one expert to the first token of its version
    kills    `kill -9` while re-maps write a packed cache, and a start behind each that resumes: the weights of the last
             change that was answered, or of the one under way, the same answers, nothing left of what was being written
    flip     milliseconds that `Engine.set_version` takes between two steps, of a version that is ready to run

Prints tables and, as the last line, one JSON object; with `--json` nothing else. The exit code is 1 if an answer
differs or something half written is left.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from engines import exit_on_signals
from remapping.bench import DERIVED, Bench
from remapping.exact import show_exact
from remapping.memory import show_kills, show_memory
from remapping.pause import show_first, show_flip, show_pause
from rich.console import Console
from rich.table import Table

from amalgam.config.placement import BASE_SOURCE
from amalgam.tools.bench import commit, hardware

SHOWS = ("exact", "pause", "memory", "first", "kills", "flip")
WRONG = ("differing", "leftovers")  # numbers of what must not be
TITLES = {
    "exact": "answers beside those of offline runs; resident in bytes",
    "pause": "milliseconds between tokens, while re-maps are under way and without",
    "memory": "bytes of a re-map of half of the layers' experts; of_limit: peak to 1.05 × (before + changed)",
    "first": "seconds from the request of a re-map to the first token of its version",
    "kills": "kill -9 midway, and a start behind each",
    "flip": "milliseconds of the exchange between two steps",
}


def print_table(console: Console, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=TITLES[name], title_justify="left", show_edge=False)
    table.add_column("")
    for index in range(len(rows)):
        table.add_column(str(index + 1), justify="right")
    for key in (key for key, value in rows[0].items() if not isinstance(value, list)):
        table.add_row(key, *(f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for row in rows))
    console.print(table)
    console.print()


def write_config(model: Path, folder: Path, sources: Mapping[str, Path]) -> Path:
    """A configuration with all sources; those that are not given are made beside it at the first start."""
    derived = {name: options for name, options in DERIVED.items() if name not in sources}
    paths = {**sources, **{name: folder / name for name in derived}}
    mixed: dict[str, Any] = {f"{name}_path": str(path.absolute()) for name, path in paths.items()}
    config = {"model": {"base_path": str(model.absolute()), "mixed_precision": {**mixed, "derived": derived}}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def given_source(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or name not in DERIVED:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with one of {', '.join(DERIVED)}")
    return name, Path(path)


def is_whole(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Whether no answer differs and nothing half written is left. Times and bytes are figures, no verdict."""
    return not any(row.get(what) for rows in found.values() for row in rows for what in WRONG)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"), help="a wide checkpoint with experts")
    parser.add_argument("--source", type=given_source, action="append", default=[], help="NAME=FOLDER, made if absent")
    parser.add_argument("--folder", type=Path, help="keeps configuration, log and made sources; default: temporary")
    parser.add_argument("--shows", nargs="+", choices=SHOWS, default=SHOWS)
    parser.add_argument("--remaps", type=int, default=200, help="of exact; pause makes 40, first 20 at most")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--versions", type=int, help="how many are compared with offline runs; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="", help="of every deployment: '--engine.num_threads 2 …', in pairs")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    arguments = parser.parse_args()
    exit_on_signals()
    console = Console(quiet=arguments.json)
    errors = Console(stderr=True, quiet=arguments.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        config = write_config(arguments.model, folder, dict(arguments.source))
        rng = random.Random(arguments.seed)
        bench = Bench(config, folder, tuple(arguments.flags.split()), arguments.streams, rng)
        sources = (BASE_SOURCE, *DERIVED)
        found: dict[str, list[dict[str, Any]]] = {}
        with errors.status("") as status:
            for show in arguments.shows:
                status.update(show)
                say = lambda text, show=show: status.update(f"{show}: {text}")  # noqa: E731
                if show == "exact":
                    found[show] = show_exact(bench, sources, arguments.remaps, arguments.versions, say)
                elif show == "pause":
                    found[show] = show_pause(bench, sources, min(arguments.remaps, 40))
                elif show == "memory":
                    found[show] = show_memory(bench, sources)
                elif show == "kills":
                    found[show] = show_kills(bench, sources, arguments.kills, say)
                elif show == "first":
                    found[show] = show_first(bench, sources, min(arguments.remaps, 20))
                else:
                    found[show] = show_flip(bench, arguments.remaps)
                print_table(console, show, found[show])
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), **found}
    print(json.dumps(document))
    return 0 if is_whole(found) else 1


if __name__ == "__main__":
    sys.exit(main())
