"""Size and speed of what happens before a model runs.

1. A composition of Qwen3-235B-A22B's shape (94 layers, 128 experts, three sources) from sparse files with true headers:
   analyze, plan, check and manifest, in seconds and memory.
2. Loading shape S in bf16 from the page cache, against the machine's copy bandwidth. Writes 5.4 GB to a temporary
   folder and takes twice that of memory; left out, with a word, where there is not so much.

Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.cli.console import out, progress_bar
from amalgam.composition.loader import ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.config.engine import EngineSettings
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.placement import Rule
from amalgam.engine.memory import available_bytes, peak_memory_bytes
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec, Slot
from amalgam.tools.analyze import analyze_checkpoint
from amalgam.tools.bench import SHAPES, commit, hardware

QWEN3_235B = {
    **SHAPES["S"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_experts": 128,
    "moe_intermediate_size": 1536,
}
SHARD_BYTES = 4 * 10**9
_SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "I64": 8}
Tensors = Iterator[tuple[str, str, list[int]]]


def published(name: str, slot: Slot, precision: str) -> Tensors:
    """The tensors (name, type, shape) that a checkpoint of this precision has for one weight."""
    if precision == "bf16" or not slot.is_linear or slot.role == "head":
        yield name, "BF16", list(slot.shape)
        return
    rows, columns = slot.shape
    module = name.removesuffix(".weight")
    if precision == "fp8":
        yield name, "F8_E4M3", [rows, columns]
        yield f"{module}.weight_scale_inv", "F32", [-(-rows // 128), -(-columns // 128)]
    else:
        yield f"{module}.weight_packed", "I32", [rows, columns // 8]
        yield f"{module}.weight_scale", "BF16", [rows, columns // 128]
        yield f"{module}.weight_shape", "I64", [2]


def write_sparse(folder: Path, config: dict[str, Any], precision: str) -> None:
    """A checkpoint whose shards have true headers and holes for data."""
    folder.mkdir()
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments, "format": "pack-quantized"}}
    quantization = {
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "int4": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups},
    }
    extra = {"quantization_config": quantization[precision]} if precision in quantization else {}
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    family, spec = read_spec(config, "config.json")
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for slot in spec.slots:
        for name, kind, shape in published(family.logical_name(slot), slot, precision):
            nbytes = _SIZES[kind] * torch.Size(shape).numel()
            if size + nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = {"dtype": kind, "shape": shape, "data_offsets": [size, size + nbytes]}
            size += nbytes
    weight_map: dict[str, str] = {}
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        raw = json.dumps(header, separators=(",", ":")).encode()
        data = max(entry["data_offsets"][1] for entry in header.values())
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + data)
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure_composition(root: Path) -> dict[str, Any]:
    """Seconds of each stage and the peak memory of a process that does nothing else."""
    baseline = peak_memory_bytes() / 2**20
    marks = [time.monotonic()]
    analysis = analyze_checkpoint(str(root / "bf16"))
    marks.append(time.monotonic())
    mixed = MixedPrecisionSettings(
        sources={"fp8": str(root / "fp8"), "int4": str(root / "int4")},
        rules=(
            Rule(pattern="model.layers.*.mlp.experts.*", source="int4"),
            Rule(pattern="model.layers.*.mlp.experts.{0-15}.*", source="fp8"),
        ),
    )
    loader = ModelLoader(
        ModelSettings(base_path=str(root / "bf16"), mixed_precision=mixed), InferenceSettings(), torch.device("cpu"), 2
    )
    loader.choose()
    marks.append(time.monotonic())
    planned = loader.plan()
    marks.append(time.monotonic())
    document = plan_manifest(planned)
    marks.append(time.monotonic())
    assert len(document["weights"]) == len(loader.spec.slots)
    stages = [after - before for before, after in pairwise(marks)]
    return {
        "weights": len(planned),
        "parameters": analysis.total.parameters or 0,
        **dict(zip(("analyze", "plan", "check", "manifest"), stages, strict=True)),
        "all": marks[-1] - marks[0],
        "peak MiB": peak_memory_bytes() / 2**20,
        "peak MiB before": baseline,
    }


def measure_loading(folder: Path, rounds: int) -> dict[str, Any]:
    """GB/s of loading shape S in bf16 from the page cache, and of plain copies by as many threads; the best rounds.

    Copies are of two kinds: between blocks that are in memory, which is the machine's bandwidth, and into new memory,
    whose pages the system must find and clear first. Every loader pays for the latter.
    """
    threads = min(EngineSettings().num_load_threads, os.cpu_count() or 1)
    spec = write_dense(folder, dict(SHAPES["S"]))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    block = torch.zeros(2**28, dtype=torch.uint8)
    there = torch.ones_like(block)
    seconds: dict[str, list[float]] = {"load": [], "copy": [], "copy to new memory": []}
    torch.set_num_threads(threads)
    for _ in range(rounds + 1):  # the first fills the page cache
        loader = ModelLoader(ModelSettings(base_path=str(folder)), InferenceSettings(), torch.device("cpu"), threads)
        with progress_bar() as progress:
            loaded = loader.build(loader.plan(), 1, progress=progress)
        assert len(loaded.version.origins) == len(spec.slots)
        seconds["load"].append(loaded.seconds * len(block) / size)
        del loaded
        for name, copy in (("copy", lambda: there.copy_(block)), ("copy to new memory", block.clone)):
            started = time.monotonic()
            copies = [copy() for _ in range(8)]
            seconds[name].append((time.monotonic() - started) / len(copies))
            del copies
    rates = {name: [len(block) / 1e9 / one for one in each[1:]] for name, each in seconds.items()}
    best = {name: max(each) for name, each in rates.items()}
    return {
        "bytes": size,
        "threads": threads,
        **{f"{name} GB/s": rate for name, rate in best.items()},
        "share of copy": best["load"] / best["copy"],
        "share of copy to new memory": best["load"] / best["copy to new memory"],
        "rounds": rates,
    }


def write_dense(folder: Path, config: dict[str, Any]) -> ModelSpec:
    """A checkpoint of random bf16 weights, the same numbers over and over."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, spec = read_spec(config, "config.json")
    noise = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).flatten()

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    write_checkpoint(folder, ((family.logical_name(slot), tensor(slot.shape)) for slot in spec.slots))
    return spec


def lacking(folder: Path) -> str | None:
    """Why shape S cannot be loaded here: it takes its size on disk, and twice that of memory for file and weights."""
    _, spec = read_spec(SHAPES["S"], "shape S")
    size = 2 * spec.num_parameters
    for what, free, needed in (
        (f"of space in {folder}", shutil.disk_usage(folder).free, size + 2**30),
        ("of memory", available_bytes(torch.device("cpu")), 2 * size + 3 * 2**30),
    ):
        if free < needed:
            return f"loading needs {needed / 1e9:.0f} GB {what}, {free / 1e9:.0f} GB are free"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write the files; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3, help="of loading; the best counts")
    parser.add_argument("--skip-loading", action="store_true", help="leave out part 2")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_composition(arguments.measure)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files go then, too
    with tempfile.TemporaryDirectory(prefix="amalgam-scale-", dir=arguments.folder) as temporary:
        root = Path(temporary)
        for precision in ("bf16", "fp8", "int4"):
            write_sparse(root / precision, dict(QWEN3_235B), precision)
        command = [sys.executable, __file__, "--measure", str(root)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results: dict[str, dict[str, Any]] = {"composition": json.loads(output.splitlines()[-1])}
        reason = "as asked" if arguments.skip_loading else lacking(root)
        results["loading"] = {"left out": reason} if reason else measure_loading(root / "S", arguments.rounds)
    table = Table("what", "figure", "value")
    for what, figures in results.items():
        for name, value in figures.items():
            if not isinstance(value, dict):
                table.add_row(
                    what,
                    name,
                    f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value,
                )
    out.print(table)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), **results}))


if __name__ == "__main__":
    main()
