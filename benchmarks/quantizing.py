"""What each way to quantize a model costs in KL on text that it has not seen, at the same bytes; or how long it takes.

    python benchmarks/quantizing.py --calibrate TEXTS.json --held-out OTHERS.json [--model FOLDER] [--cases int4 ...]
    python benchmarks/quantizing.py --speed FOLDER [--out FOLDER]

A case is `format[:method[:option=value…]]`, for instance `int4:gptq:group_size=32`. Each is made in a temporary folder,
and the model of it compared with the wide one: the mean KL divergence over all held-out tokens, file by file, with a
95% interval over the texts' sequences (bootstrap). Prints a table and, as the last line, one JSON object.

With `--speed`, a checkpoint is rounded to int4, and its time compared with what reading its files, the arithmetic in
memory, and writing as many bytes as there are at the end take one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.calibration.texts import sequences
from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import make_checkpoint
from amalgam.composition.quantizing.recipe import CalibrationTexts, Recipe
from amalgam.composition.source import Source
from amalgam.config.settings import InferenceSettings, ModelSettings
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
CPU, BLOCK_SIZE = torch.device("cpu"), 16
DEFAULT_CASES = ("int4:round", "int4:search", "int4:gptq", "int4:awq")
_UNCALIBRATED = ("round",)


class Reader:
    """Log-probabilities that a checkpoint gives to the tokens of held-out texts, sequence by sequence."""

    def __init__(self, folder: Path) -> None:
        loader = ModelLoader(ModelSettings(base_path=str(folder)), InferenceSettings(dtype="float32"), CPU, threads=2)
        self._version = loader.build(loader.plan(), 1).version
        self._decoder = Decoder(loader.spec, 4096, torch.float32, CPU)

    @torch.inference_mode()
    def log_probabilities(self, token_ids: list[int]) -> Tensor:
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        cache = KVCache.allocate(self._decoder.spec, num_blocks, BLOCK_SIZE, torch.float32, CPU)
        step = StepContext([StepSequence(token_ids, 0, range(num_blocks), len(token_ids))], cache)
        return self._decoder.forward(step, self._version).log_softmax(-1)


def parse(case: str, texts: CalibrationTexts) -> Recipe:
    """`int4:gptq:group_size=32` as a recipe."""
    name, *rest = case.split(":")
    method = rest[0] if rest else "round"
    given = dict(option.split("=") for option in rest[1:])
    options = QuantizeOptions(
        int(given["group_size"]) if "group_size" in given else None, given.get("scale"), "zero_points" in given
    )
    return Recipe(name, options, method, texts=None if method in _UNCALIBRATED else texts)  # type: ignore[arg-type]


def compare(
    model: Path, held_out: list[Path], tokens: int, texts: CalibrationTexts, cases: list[str]
) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.load(model)
    pieces = {
        file.stem: sequences([file], tokenizer, max_tokens=tokens, sequence_tokens=512, min_tokens=64)
        for file in held_out
    }
    reader = Reader(model)
    reference = {name: [reader.log_probabilities(piece) for piece in found] for name, found in pieces.items()}
    results: list[dict[str, Any]] = []
    names = list(pieces)
    print(f"{'case':28}{'MB':>8}{'seconds':>9}" + "".join(f"{name:>14}" for name in names) + f"{'all':>11}  95%")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "made"
            started = time.monotonic()
            report = make_checkpoint(str(model), out, parse(case, texts))
            seconds = time.monotonic() - started
            made = Reader(out)
            sums: list[tuple[float, int]] = []
            by_file = {}
            for name, found in pieces.items():
                own = []
                for piece, expected in zip(found, reference[name], strict=True):
                    divergence = (expected.exp() * (expected - made.log_probabilities(piece))).sum(-1)
                    own.append((float(divergence.sum()), len(piece)))
                by_file[name] = sum(total for total, _ in own) / sum(count for _, count in own)
                sums += own
        low, high = interval(sums)
        mean = sum(total for total, _ in sums) / sum(count for _, count in sums)
        row = {"case": case, "bytes": report.bytes_after, "seconds": seconds, "kl": mean, "kl_95": [low, high]}
        results.append({**row, "kl_by_file": by_file, "rounded": len(report.rounded)})
        figures = "".join(f"{by_file[name]:14.5f}" for name in names)
        print(
            f"{case:28}{report.bytes_after / 1e6:8.2f}{seconds:9.1f}{figures}{mean:11.5f}  {low:.5f}–{high:.5f}",
            flush=True,
        )
    return results


def interval(sums: list[tuple[float, int]], rounds: int = 2000) -> tuple[float, float]:
    """The 95% interval of a mean over sequences, drawn anew."""
    table = torch.tensor(sums, dtype=torch.float64)
    drawn = table[torch.randint(len(table), (rounds, len(table)), generator=torch.Generator().manual_seed(1))]
    means = drawn[..., 0].sum(1) / drawn[..., 1].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def speed(model: Path, out: Path) -> dict[str, Any]:
    """Seconds of the parts and of the whole; files are read once before, so that all read from memory alike."""
    source = Source.open("base", str(model))
    target = writable_format("int4")
    for file in source.store.files:
        file.read_bytes()
    parts = dict.fromkeys(("reading", "arithmetic", "writing"), 0.0)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        with (Path(folder) / "raw").open("wb") as raw:
            for name, stored in source.weights.items():
                started = time.monotonic()
                wide = source.load(stored).dense
                parts["reading"] += time.monotonic() - started
                started = time.monotonic()
                is_linear = name.endswith("_proj.weight")
                tensors = quantize(wide, target, round_to_nearest).tensors if is_linear else {"weight": wide}
                parts["arithmetic"] += time.monotonic() - started
                started = time.monotonic()
                for tensor in tensors.values():
                    raw.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                parts["writing"] += time.monotonic() - started
            started = time.monotonic()
            raw.flush()
            os.fsync(raw.fileno())
            parts["writing"] += time.monotonic() - started
        started = time.monotonic()
        make_checkpoint(str(model), Path(folder) / "made", Recipe("int4"))
        whole = time.monotonic() - started
    return {**parts, "whole": whole, "ratio": whole / sum(parts.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[])
    parser.add_argument("--held-out", type=Path, nargs="+", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="of each file")
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_CASES))
    parser.add_argument("--speed", type=Path, help="a wide checkpoint")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="where --speed writes")
    options = parser.parse_args()
    if options.speed is not None:
        figures = speed(options.speed, options.out)
        for name, value in figures.items():
            print(f"{name:12}{value:10.2f}")
        results: Any = figures
    else:
        if not options.calibrate or not options.held_out:
            parser.error("--calibrate and --held-out are needed")
        texts = CalibrationTexts(tuple(options.calibrate), options.calibration_tokens)
        results = compare(options.model, options.held_out, options.held_out_tokens, texts, options.cases)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
