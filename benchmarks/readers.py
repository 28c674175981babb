"""Whether other engines read what `amalgam quantize` makes, and what they make of it.

    python benchmarks/readers.py --text FILE --transformers PYTHON --vllm PYTHON [--model FOLDER] [--cases int4 …]
    python benchmarks/readers.py --text FILE --vllm PYTHON --made FOLDER …    of folders that `amalgam export` wrote

A case is a format, with `+dynamic` where 8-bit activations are declared: vLLM's CPU build takes int8 and fp8 so only,
and rounds them then, which amalgam does not. Each is made of the model. amalgam and the engines compute the same
windows, each engine in its own environment, named by its Python: transformers in float32 with compressed-tensors, vLLM
in bfloat16.

Prints for each engine the KL divergence of its next tokens from ours, in nats, and how often both find the same token
likeliest; beside it, what quantizing itself has cost (from the wide model to ours). Or the last error of an engine that
refuses. Prints one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from engines import CONTESTANTS
from torch import Tensor

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import make_checkpoint
from amalgam.composition.quantizing.recipe import Recipe
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.evaluation.quality import log_probabilities, scored
from amalgam.evaluation.running import open_contestant
from amalgam.evaluation.texts import Sample, read_texts, sample_of
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
CASES = ("int4", "int8+dynamic", "fp8+dynamic")
ENGINES = {"transformers": "float32", "vllm": "bfloat16"}  # with the type of their activations
WINDOW = 128


def ours(folder: Path, sample: Sample) -> Tensor:
    """Log-probabilities of every position but each window's last."""
    loader = ModelLoader(
        ModelSettings(base_path=str(folder)), InferenceSettings(dtype="float32"), torch.device("cpu"), 2
    )
    model = open_contestant(folder.name, loader, loader.plan(()), torch.float32, WINDOW)
    found = []
    for step, hidden in model.hidden(sample.windows):
        rows, _ = scored(sample.windows[step.start : step.stop])
        found.append(log_probabilities(model.compiled, hidden[rows], model.name))
    return torch.cat(found)


def theirs(engine: str, python: str, folder: Path, sample: Sample, work: Path) -> Tensor | str:
    """The same by another engine; or why it does not."""
    ids, out = work / "ids.json", work / f"{engine}.pt"
    ids.write_text(json.dumps([window.token_ids for window in sample.windows]))
    script = [python, str(CONTESTANTS / "logits.py"), engine, str(folder), str(ids), str(out), ENGINES[engine]]
    result = subprocess.run(script, capture_output=True, text=True, errors="replace")
    if result.returncode:
        said = (result.stderr + result.stdout).splitlines()
        errors = [line for line in said if "Error" in line and "root cause above" not in line]
        return errors[-1] if errors else f"it ended with {result.returncode}"
    found: Tensor = torch.load(out, weights_only=True).double()
    return found


def make(case: str, model: Path, folder: Path) -> Path:
    name, _, activations = case.partition("+")
    make_checkpoint(str(model), folder, Recipe(name, activations=activations or None))  # type: ignore[arg-type]
    return folder


def divergence(one: Tensor, other: Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--made", nargs="+", type=Path, metavar="FOLDER", help="in place of cases")
    for engine in ENGINES:
        parser.add_argument(f"--{engine}", metavar="PYTHON", help=f"of an environment with {engine}")
    options = parser.parse_args()
    pythons = {engine: python for engine in ENGINES if (python := getattr(options, engine))}
    tokenizer = Tokenizer.load(options.model)
    sample = sample_of(read_texts(options.text), tokenizer, window=WINDOW, max_tokens=options.tokens)
    wide = ours(options.model, sample)
    results: list[dict[str, Any]] = []
    print(f"{'case':16}{'engine':16}{'KL, ours to it':>16}{'same token':>12}{'KL, wide to ours':>18}")
    for what in options.made or options.cases:
        with tempfile.TemporaryDirectory() as work:
            made = what if options.made else make(what, options.model, Path(work) / "made")
            case = made.name if options.made else what
            own = ours(made, sample)
            cost = divergence(wide, own)
            for engine, python in pythons.items():
                found = theirs(engine, python, made, sample, Path(work))
                row: dict[str, Any] = {"case": case, "engine": engine, "kl_wide_to_ours": cost}
                if isinstance(found, str):
                    row["refused"] = found
                    print(f"{case:16}{engine:16}  {found[:120]}", flush=True)
                else:
                    row["kl"] = divergence(own, found)
                    row["agreement"] = float((own.argmax(-1) == found.argmax(-1)).double().mean())
                    print(f"{case:16}{engine:16}{row['kl']:16.2e}{row['agreement']:12.1%}{cost:18.5f}", flush=True)
                results.append(row)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
