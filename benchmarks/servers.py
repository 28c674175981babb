"""Servers of one model, each a process: amalgam's, llama.cpp's and vLLM's.

In: which one, and the folder that keeps models and environments. Out: an address once it answers, its memory and its
descriptors. Must never know what is measured.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients import Address
from engines import Child, free_port, process_memory
from llama_builds import LLAMA_SERVER

ROOT = Path(__file__).resolve().parents[1]
MAX_SEQUENCES = 32  # that run together, in every server


@dataclass(frozen=True)
class Server:
    """How to start a server.

    Attributes:
        model: a file or folder in the folder of models, or an absolute path.
        precision: of its weights; servers of the same are compared. Empty: of another model, to try a scenario.
        environment: a virtual environment there; ours if empty.
        command: what is run in the environment; {model}, {port}, {tokens} (of the longest sequence), {sequences} and
            {room} (tokens of all sequences together) are filled in.
        kv_bytes_per_token: of the model, in 16 bits.
        caching: what is added where prompts share a prefix, and where they do not.
        fields: what the bodies of its requests have beside OpenAI's fields.
    """

    model: str
    precision: str
    command: tuple[str, ...]
    kv_bytes_per_token: int = 16384  # of shape S
    environment: str = ""
    caching: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    variables: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return not self.environment


def _ours(model: str, precision: str, **fields: Any) -> Server:
    flags = (
        "--inference.max_seq_length {tokens} --inference.max_batch_size {sequences} --engine.kv_cache_bytes {kv_bytes}"
    )
    return Server(
        model,
        precision,
        (sys.executable, str(ROOT / "main.py"), "--model", "{model}", "--port", "{port}", *flags.split()),
        fields={"ignore_eos": True, "top_k": 0},
        **fields,
    )


def _llama(model: str, precision: str) -> Server:
    flags = (
        "-m {model} --port {port} --alias model -np {sequences} -c {room} --kv-unified -t 2 -tb 2 -b 2048 -ub 512"
        " --no-ui --offline"
    )
    return Server(
        model,
        precision,
        (f"{LLAMA_SERVER}/llama-server", *flags.split()),
        environment="llama-server",
        caching=((), ("--no-cache-prompt", "--cache-ram", "0")),
        fields={"ignore_eos": True, "top_k": 0, "min_p": 0.0},
    )


def _vllm(model: str, precision: str) -> Server:
    flags = (
        "-m vllm.entrypoints.openai.api_server --model {model} --port {port} --host 127.0.0.1"
        " --served-model-name model --dtype bfloat16 --max-model-len {tokens} --max-num-seqs {sequences}"
        " --max-num-batched-tokens 2048 --enforce-eager --disable-uvicorn-access-log"
    )
    return Server(
        model,
        precision,
        ("bin/python", *flags.split()),
        environment="vllm",
        caching=(("--enable-prefix-caching",), ("--no-enable-prefix-caching",)),
        variables={
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_NO_USAGE_STATS": "1",
        },
        fields={"ignore_eos": True},
    )


SERVERS = {
    "amalgam int4": _ours("S-int4", "int4"),
    "llama.cpp Q4_0": _llama("S-Q4_0.gguf", "int4"),
    "amalgam bf16": _ours("S", "bf16"),
    "vLLM bf16": _vllm("S", "bf16"),
    "llama.cpp bf16": _llama("S-bf16.gguf", "bf16"),
    "amalgam demo": _ours(str(ROOT / "models" / "demo"), "", kv_bytes_per_token=3072),
}


class Running(Child):
    """A server that answers; stopped while another is asked."""

    def __init__(
        self,
        name: str,
        server: Server,
        folder: Path,
        *,
        max_tokens: int,
        room: int | None,
        shares_prefixes: bool,
        flags: tuple[str, ...],
    ) -> None:
        port, room = free_port(), room or max_tokens * MAX_SEQUENCES
        values = {
            "model": folder / server.model,
            "port": port,
            "tokens": max_tokens,
            "sequences": MAX_SEQUENCES,
            "room": room,
            "kv_bytes": room * server.kv_bytes_per_token,
        }
        program, *arguments = (part.format(**values) for part in server.command)
        if server.environment:
            program = str(folder / server.environment / program)
        caching = server.caching[0 if shares_prefixes else 1]
        self.name = name
        log = folder / f"{name.replace(' ', '-')}-server.log"
        super().__init__([program, *arguments, *caching, *flags], log, server.variables)
        self.address = Address(port, "model", dict(server.fields))
        self.wait_until(self._lists_its_model)

    def _lists_its_model(self) -> bool:
        """Whether it does; the model is then the address's."""
        try:
            if not self._is_ready():
                return False
            models = json.loads(self.get("/v1/models"))
        except ValueError:
            return False
        self.address = Address(self.address.port, models["data"][0]["id"], self.address.fields)
        return True

    def _is_ready(self) -> bool:
        """llama.cpp's and vLLM's `/health` are 200 once they are ready; ours also while it loads, but not `/ready`."""
        try:
            self.get("/ready")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                return False
            self.get("/health")
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.address.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def gauges(self) -> dict[str, float]:
        """The metrics without labels."""
        lines = (line.split() for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return {line[0]: float(line[1]) for line in lines if "{" not in line[0]}

    @property
    def resident_bytes(self) -> int:
        """Memory that is its own: mapped files are not counted."""
        return process_memory(self.process.pid, "RssAnon")

    @property
    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def serving(
    names: Mapping[str, Server],
    folder: Path,
    *,
    max_tokens: int,
    room: int | None = None,
    shares_prefixes: bool = False,
    flags: tuple[str, ...] = (),
) -> Iterator[dict[str, Running]]:
    """Servers that are ready, and stopped.

    Args:
        max_tokens: of the longest sequence.
        room: tokens of all sequences together; None: for as many of the longest as run together.
        flags: for each server, at the end of its command.
    """
    with ExitStack() as cleanup:
        running = {}
        for name, server in names.items():
            running[name] = Running(
                name, server, folder, max_tokens=max_tokens, room=room, shares_prefixes=shares_prefixes, flags=flags
            )
            cleanup.callback(running[name].close)
            running[name].pause()
        yield running


@contextmanager
def awake(server: Child) -> Iterator[None]:
    server.resume()
    try:
        yield
    finally:
        server.pause()
