"""Size and speed of what happens before a model runs.

1. A composition of Qwen3-235B-A22B's shape (94 layers, 128 experts, three sources) from sparse files with true headers:
   analyze, plan, check and manifest, in seconds and memory.
2. Loading shape S in bf16 from the page cache, against the machine's copy bandwidth.

Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from amalgam.config import InferenceSettings, MixedPrecisionSettings, ModelSettings, Rule
from amalgam.engine.memory import peak_memory_bytes
from amalgam.models.loader import ModelLoader
from amalgam.models.spec import Slot, read_spec
from amalgam.tools.analyze import analyze_checkpoint
from amalgam.tools.bench import SHAPES, commit, hardware
from amalgam.tools.manifest import plan_manifest

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
    weight_map = {}
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        raw = json.dumps(header, separators=(",", ":")).encode()
        data = max(entry["data_offsets"][1] for entry in header.values())
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + data)
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure_composition(root: Path) -> dict[str, float]:
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
    plan = loader.make_plan()
    marks.append(time.monotonic())
    planned = loader.check(plan)
    marks.append(time.monotonic())
    document = plan_manifest(planned)
    marks.append(time.monotonic())
    assert len(document["weights"]) == len(loader.spec.slots)
    stages = [after - before for before, after in pairwise(marks)]
    return {
        "weights": len(planned),
        "parameters": float(analysis.total.parameters or 0),
        **dict(zip(("analyze", "plan", "check", "manifest"), stages, strict=True)),
        "all": marks[-1] - marks[0],
        "peak MiB": peak_memory_bytes() / 2**20,
        "peak MiB before": baseline,
    }


def measure_loading(folder: Path, rounds: int) -> dict[str, float]:
    """GB/s of loading shape S in bf16 from the page cache, and of a plain copy by the same number of threads."""
    config = dict(SHAPES["S"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, spec = read_spec(config, "config.json")
    from amalgam.checkpoint.writer import write_checkpoint

    noise = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).flatten()

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    write_checkpoint(folder, ((family.logical_name(slot), tensor(slot.shape)) for slot in spec.slots))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    loads, copies = [], []
    block = torch.zeros(2**28, dtype=torch.uint8)
    for _ in range(rounds + 1):  # the first fills the page cache
        loader = ModelLoader(ModelSettings(base_path=str(folder)), InferenceSettings(), torch.device("cpu"), 2)
        loads.append(loader.build(loader.make_plan(), 1).seconds)
        started = time.monotonic()
        copied = [block.clone() for _ in range(8)]
        copies.append(len(copied) * len(block) / (time.monotonic() - started))
        del copied
    load, copy = size / sorted(loads[1:])[rounds // 2], sorted(copies[1:])[rounds // 2]
    return {"bytes": size, "load GB/s": load / 1e9, "copy GB/s": copy / 1e9, "share of copy": load / copy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write the files; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-loading", action="store_true", help="leave out part 2, which writes 5.4 GB")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_composition(arguments.measure)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        for precision in ("bf16", "fp8", "int4"):
            write_sparse(root / precision, dict(QWEN3_235B), precision)
        command = [sys.executable, __file__, "--measure", str(root)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results = {"composition": json.loads(output.splitlines()[-1])}
        if not arguments.skip_loading:
            results["loading"] = measure_loading(root / "S", arguments.rounds)
    table = Table("what", "figure", "value")
    for what, figures in results.items():
        for name, value in figures.items():
            table.add_row(what, name, f"{value:,.2f}")
    Console().print(table)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), **results}))


if __name__ == "__main__":
    main()
