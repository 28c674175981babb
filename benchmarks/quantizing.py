"""What each way to quantize a model costs in KL on text that it has not seen, at the same bytes; or how long it takes.

    python benchmarks/quantizing.py --calibrate TEXTS.json --held-out OTHERS.json [--model FOLDER] [--cases int4 ...]
    python benchmarks/quantizing.py --against auto-round llm-compressor --calibrate … --held-out …
    python benchmarks/quantizing.py --speed FOLDER [--out FOLDER]

A case is `format[:method[:option=value…]]`, for instance `int4:gptq:group_size=32`; `int4:llm-compressor/gptq` lets
another tool do it. Each is made in a temporary folder, and the model of it compared with the wide one as `amalgam
evaluate` does: the mean KL divergence over all held-out tokens, in float32, with a 95% interval. Prints a table and, as
the last line, one JSON object.

`--against` adds what other tools make by their methods, and says how far each of ours is from each of theirs, by draws
of the same texts for both. They read the same token ids. Their environments are made where there are none, or named
with `--environment TOOL=FOLDER`.

With `--speed`, a checkpoint is rounded to int4, and its time compared with what reading its files, the arithmetic in
memory, and writing as many bytes as there are at the end take one after the other; and so the processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import make_checkpoint
from amalgam.composition.quantizing.recipe import CalibrationTexts, Recipe
from amalgam.composition.quantizing.report import QuantizeReport
from amalgam.composition.source import Source
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.evaluation.confidence import Bootstrap, Interval
from amalgam.evaluation.quality import Figures, Reference, by_domain
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import read_texts, sample_of
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware
from amalgam.tools.quantizing.environment import default_folder, open_environment
from amalgam.tools.quantizing.external import TOOLS, ExternalRecipe, quantize_with

ROOT = Path(__file__).resolve().parents[1]
CPU, WINDOW = torch.device("cpu"), 512
DEFAULT_CASES = ("int4:round", "int4:search", "int4:gptq", "int4:awq")
PARTS = ("reading", "arithmetic", "writing")
_UNCALIBRATED = ("round",)
_READ_BYTES = 2**24


def make(
    case: str, model: Path, out: Path, texts: CalibrationTexts, environments: Mapping[str, Path]
) -> QuantizeReport:
    """`int4:gptq:group_size=32`, or `int4:llm-compressor/gptq:group_size=32`."""
    name, *rest = case.split(":")
    tool, _, method = (rest[0] if rest else "round").rpartition("/")
    given = dict(option.split("=") for option in rest[1:])
    options = QuantizeOptions(
        int(given["group_size"]) if "group_size" in given else None, given.get("scale"), "zero_points" in given
    )
    read = None if method in _UNCALIBRATED else texts
    if not tool:
        return make_checkpoint(str(model), out, Recipe(name, options, method, texts=read))  # type: ignore[arg-type]
    found = TOOLS[tool]
    folder = environments.get(tool, default_folder(found.name, found.version))
    say = partial(print, flush=True)
    environment = partial(open_environment, folder, found.distribution, found.requirements, say)
    return quantize_with(found, environment, str(model), out, ExternalRecipe(name, options, method, texts=read))


def opened(folder: Path) -> Contestant:
    loader = ModelLoader(ModelSettings(base_path=str(folder)), InferenceSettings(dtype="float32"), CPU, threads=2)
    return open_contestant(folder.name, loader, loader.plan(()), torch.float32, WINDOW)


def compare(
    model: Path,
    held_out: list[Path],
    tokens: int,
    texts: CalibrationTexts,
    cases: list[str],
    environments: Mapping[str, Path],
) -> list[dict[str, Any]]:
    sample = sample_of(
        read_texts([str(file) for file in held_out]),
        Tokenizer.load(model),
        window=WINDOW,
        max_tokens=tokens * len(held_out),
    )
    reference = Reference(opened(model), sample)
    results: list[dict[str, Any]] = []
    measured: dict[str, Figures] = {}
    print(f"{'case':34}{'MB':>8}{'seconds':>9}" + "".join(f"{n:>16}" for n in sample.domains) + f"{'all':>11}  95%")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "made"
            started = time.monotonic()
            report = make(case, model, out, texts, environments)
            seconds = time.monotonic() - started
            figures = measured[case] = reference.figures(opened(out))
        of_all = Bootstrap(figures.units).mean(figures.divergence)
        by_file = {
            name: quality.divergence.value
            for name, quality in by_domain(figures, sample).items()
            if quality.divergence is not None
        }
        row = {"case": case, "tool": report.tool, "bytes": report.bytes_after, "seconds": seconds, "kl": asdict(of_all)}
        results.append({**row, "kl_by_file": by_file, "rounded": len(report.rounded)})
        columns = "".join(f"{by_file[name]:16.5f}" for name in sample.domains)
        print(f"{case:34}{report.bytes_after / 1e6:8.2f}{seconds:9.1f}{columns}{shown(of_all)}", flush=True)
    others = [case for case in cases if "/" in case]
    for case in cases:
        if case in others or not others:
            continue
        differences = {
            other: Bootstrap(measured[case].units).ratio_of_means(measured[case].divergence, measured[other].divergence)
            for other in others
        }
        for other, difference in differences.items():
            print(f"{case:20} to {other:34}{shown(difference, '{:+.1%}')}")
        results.append({"case": case, "to": {other: asdict(each) for other, each in differences.items()}})
    return results


def shown(value: Interval, form: str = "{:.5f}") -> str:
    text = f"{form.format(value.value):>11}"
    return text if value.low is None else f"{text}  {form.format(value.low)} to {form.format(value.high)}"


class Clock:
    """Seconds of named parts, and how much of them processors were at work for this program."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.busy: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started, busy = time.monotonic(), time.process_time()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
        self.busy[part] = self.busy.get(part, 0.0) + time.process_time() - busy

    def show(self, *parts: str) -> None:
        for part in parts:
            print(f"{part:12}{self.seconds[part]:10.2f}{self.busy[part]:10.2f}", flush=True)


def speed(model: Path, out: Path) -> dict[str, Any]:
    """Seconds of the parts and of the whole; files are read once before, so that all read from memory alike."""
    source = Source.open("base", str(model))
    target = writable_format("int4")
    for file in source.store.files:
        with file.open("rb") as read:
            while read.read(_READ_BYTES):
                pass
    clock = Clock()
    print(f"{'':12}{'seconds':>10}{'busy':>10}")
    with tempfile.TemporaryDirectory(dir=out) as folder:
        with (Path(folder) / "raw").open("wb") as raw:
            for name, stored in source.weights.items():
                with clock("reading"):
                    wide = source.load(stored).dense
                with clock("arithmetic"):
                    is_linear = name.endswith("_proj.weight")
                    tensors = quantize(wide, target, round_to_nearest).tensors if is_linear else {"weight": wide}
                with clock("writing"):
                    for tensor in tensors.values():
                        raw.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            with clock("writing"):
                raw.flush()
                os.fsync(raw.fileno())
        clock.show(*PARTS)
        (Path(folder) / "raw").unlink()
        with clock("whole"):
            make_checkpoint(str(model), Path(folder) / "made", Recipe("int4"))
        clock.show("whole")
    ratios = [each["whole"] / sum(each[part] for part in PARTS) for each in (clock.seconds, clock.busy)]
    print(f"{'ratio':12}{ratios[0]:10.2f}{ratios[1]:10.2f}")
    return {"seconds": clock.seconds, "busy": clock.busy, "ratio": ratios[0], "busy_ratio": ratios[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[])
    parser.add_argument("--held-out", type=Path, nargs="+", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="of each file")
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_CASES))
    parser.add_argument("--against", nargs="+", choices=list(TOOLS), default=[], help="int4 of other tools too")
    parser.add_argument("--environment", nargs="+", default=[], metavar="TOOL=FOLDER")
    parser.add_argument("--speed", type=Path, help="a wide checkpoint")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="where --speed writes")
    options = parser.parse_args()
    if options.speed is not None:
        results: Any = speed(options.speed, options.out)
    else:
        if not options.calibrate or not options.held_out:
            parser.error("--calibrate and --held-out are needed")
        texts = CalibrationTexts(tuple(options.calibrate), options.calibration_tokens)
        environments = {tool: Path(folder) for tool, _, folder in (text.partition("=") for text in options.environment)}
        cases = [*options.cases, *(f"int4:{tool}/{way}" for tool in options.against for way in TOOLS[tool].methods)]
        results = compare(options.model, options.held_out, options.held_out_tokens, texts, cases, environments)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
