"""How long `amalgam serve` takes until it is ready, with and without the packed cache.

Shape S with random int4 weights (1.6 GB) is written once into `--folder`. Then servers are started one after the
other, each a process of its own with all its imports, timed from its creation to the first `/ready` that answers 200,
and on to the first answered token. `cpu` is the processor time until ready, which other load disturbs less:

    source       no packed cache: reads the checkpoint and packs
    fill         an empty packed cache: reads, packs and writes it
    mapped       the packed cache is there
    import torch a process that does nothing else: what every start has in it

All files are in the page cache, unless `--cold` drops them from it before each start.
Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engines import process_memory
from rich.console import Console
from rich.table import Table

from amalgam.base.files import resumable_folder
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.formats.registry import writable_format
from amalgam.models.registry import read_spec
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.tools.bench import SHAPES, commit, hardware

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05  # each answer takes the server a millisecond from loading
LIMIT_SECONDS = 600
FIGURES = ("ready s", "cpu s", "load s", "first token s", "anonymous MiB")


def write_shape(folder: Path) -> None:
    """Shape S with int4 linear weights, as compressed-tensors publishes them, and a BPE tokenizer of its vocabulary."""
    config = dict(SHAPES["S"])
    family, spec = read_spec(config, "shape S")
    int4 = writable_format("int4")
    made: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    scheme: dict[str, Any] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for slot in spec.slots:
            name = family.logical_name(slot)
            noise = torch.randn(slot.shape, generator=torch.Generator().manual_seed(0)) * 0.02
            if not slot.is_linear or slot.role == "head":
                yield name, noise.to(torch.bfloat16)
                continue
            if slot.shape not in made:  # quantizing is slow, and equal bytes take as long to read as others
                encoded = quantize(noise, int4, round_to_nearest)
                made[slot.shape] = dict(encoded.tensors)
                scheme.update(int4.scheme(encoded.grid).arguments)
            for suffix, tensor in made[slot.shape].items():
                yield f"{name.removesuffix('.weight')}.{suffix}", tensor

    with resumable_folder(folder, lambda partial: False) as temporary:
        write_checkpoint(temporary, tensors())
        group = {"targets": ["Linear"], "weights": scheme, "format": "pack-quantized"}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        }
        (temporary / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        write_tokenizer(temporary, config["vocab_size"])


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE whose merges are the first pairs of bytes: no language, but the work of reading a real one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in alphabet for second in alphabet][: vocab_size - len(alphabet)]
    vocab = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": alphabet[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def start(model: Path, cache: Path | None, flags: list[str]) -> dict[str, float]:
    """Start a server, wait until it has answered one token, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "main.py"), "--model", str(model), "--port", str(port), *flags]
    if cache is not None:
        command += ["--inference.packed_cache", str(cache)]
    # Where the shell forbids to keep compiled modules, every start would compile ours.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while ask(port, "/ready") is None:
                if server.poll() is not None or time.monotonic() - started > LIMIT_SECONDS:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not get ready:\n{log.read().decode()}")
                time.sleep(POLL_SECONDS)
            ready = time.monotonic() - started
            cpu = cpu_seconds(server.pid)
            ask(port, "/generate", {"prompt": "a", "max_new_tokens": 1, "do_sample": False})
            answered = time.monotonic() - started
            info = ask(port, "/model_info")
            assert info is not None
            return {
                "ready s": ready,
                "cpu s": cpu,
                "load s": info["load_seconds"],
                "first token s": answered,
                "anonymous MiB": process_memory(server.pid, "RssAnon") / 2**20,
            }
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def import_torch() -> dict[str, float]:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return {"ready s": time.monotonic() - started}


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """A server's answer; None while it cannot be reached or is loading."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (urllib.error.URLError, ConnectionError):
        if body is not None:
            raise
        return None


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far: what being ready takes on a machine that does nothing else."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_page_cache(files: list[Path], is_wanted: bool) -> None:
    """Read files, or have the system forget them."""
    for file in files:
        with file.open("rb") as stream:
            if is_wanted:
                while stream.read(2**24):
                    pass
            else:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint and the cache are; default: temporary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each start")
    parser.add_argument("flags", nargs="*", help="further flags of `amalgam serve`, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        model, cache = root / "shape-S-int4", root / "packed-cache"
        if not model.exists():
            write_shape(model)
        samples: dict[str, list[dict[str, float]]] = {"source": [], "fill": [], "mapped": [], "import torch": []}
        for _ in range(arguments.rounds):  # the contestants take turns, so that a disturbance hits all
            shutil.rmtree(cache, ignore_errors=True)
            for what, runs in samples.items():
                files = [*model.glob("*"), *(cache.glob("*") if cache.exists() else ())]
                in_page_cache(files, is_wanted=not arguments.cold)
                if what == "import torch":
                    runs.append(import_torch())
                else:
                    runs.append(start(model, None if what == "source" else cache, arguments.flags))
    results = {
        what: {
            name: {"median": median(values), "all": values}
            for name in FIGURES
            if (values := [run[name] for run in runs if name in run])
        }
        for what, runs in samples.items()
    }
    table = Table("start", *FIGURES, title="page cache " + ("cold" if arguments.cold else "warm"))
    for what, figures in results.items():
        table.add_row(what, *(f"{figures[name]['median']:,.2f}" if name in figures else "" for name in FIGURES))
    Console().print(table)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), **results}))


if __name__ == "__main__":
    main()
