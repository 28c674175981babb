"""A wheel as a user gets it: a new environment, no compiler in the path, the README's commands. `make try` runs it.

In: a wheel; without one, that of `dist/` for this interpreter. Out: what each command printed, and exit code 1 if one
failed. With `--lowest` each library has the lowest version that the wheel's metadata allows. uv installs, and heeds its
variables: `UV_TORCH_BACKEND=cpu` spares a machine without a GPU several GB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:8080"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja")
NEEDED = ("curl", "uname")  # of the system, by commands of the README


def find_wheel() -> Path:
    """
    Raises:
        SystemExit: there is none for this interpreter.
    """
    minor = sys.version_info.minor
    tag = "cp311-cp311" if minor == 11 else "cp312-abi3"
    machine = sysconfig.get_platform().rpartition("-")[2]
    found = sorted((ROOT / "dist").glob(f"amalgam_llm-*-{tag}-*_{machine}.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"There is no wheel for Python 3.{minor} in dist/: run `make wheel`.")
    return found[-1]


def lowest_versions(wheel: Path) -> list[str]:
    """`name==version` for every library that the wheel's metadata asks for without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    wanted = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    found = [re.match(r"([\w.-]+).*?>=([\w.]+)", line) for line in wanted]
    if None in found:
        sys.exit(f"A requirement has no lower bound: {wanted[found.index(None)]}")
    return [f"{match[1]}=={match[2]}" for match in found if match]


def uv(*words: str) -> None:
    """
    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "uv", *words], check=True)


class Trial:
    """An environment with a wheel in it, and the demo's folder, where commands run.

    Args:
        folder: where both are made.
        pins: versions that the libraries shall have.
    """

    def __init__(self, folder: Path, wheel: Path, pins: list[str]) -> None:
        self._bin = folder / "env/bin"
        self._folder = folder / "demo"
        tools = folder / "tools"
        tools.mkdir()
        for name in NEEDED:
            if place := shutil.which(name):
                (tools / name).symlink_to(place)
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "AMALGAM_", "CC", "CXX"))
        }
        self._environment = {**kept, "PATH": f"{self._bin}:{tools}", "HOME": str(folder)}
        found = [name for name in COMPILERS if shutil.which(name, path=self._environment["PATH"])]
        assert not found, f"{found} can be found"
        print(f"Installing {wheel.name} {' '.join(pins)}", flush=True)
        python = str(self._bin / "python")
        uv("venv", "--quiet", "--python", sys.executable, str(folder / "env"))
        uv("pip", "install", "--quiet", "--only-binary", ":all:", "--python", python, str(wheel), *pins)
        uv("pip", "check", "--python", python)
        self._run("amalgam", "--version", cwd=folder)
        self._run("amalgam", "demo", str(self._folder), cwd=folder)

    def _run(self, *words: str, cwd: Path | None = None) -> str:
        """What a command of the environment printed. Prints one line about it.

        Raises:
            SystemExit: it failed.
        """
        start = time.monotonic()
        result = subprocess.run(
            words, cwd=cwd or self._folder, env=self._environment, capture_output=True, text=True, check=False
        )
        summary = " ".join(result.stdout.split())[:90]
        print(f"{time.monotonic() - start:6.1f} s  {shlex.join(words)[:100]}  →  {summary}", flush=True)
        if result.returncode:
            sys.exit(f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        return result.stdout

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        """`amalgam serve` on a free port; gives its address."""
        words = [str(self._bin / "amalgam"), "serve", "--config", "config/model_config.yaml", "--port", "0"]
        log = self._folder.parent / "server.log"
        with log.open("w") as out:
            process = subprocess.Popen(words, cwd=self._folder, env=self._environment, stderr=out)
        try:
            yield self._address(log, process)
        finally:
            process.terminate()
            process.wait(timeout=60)
        assert process.returncode == 0, log.read_text()

    @staticmethod
    def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
        """Where the server listens, once it is ready."""
        while process.poll() is None:
            if match := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{match[0]}/ready", timeout=5)
                    return match[0]
            time.sleep(0.2)
        sys.exit(f"The server has ended.\n{log.read_text()}")

    def run_readme(self, text: str) -> None:
        """The commands and programs of a README that do not belong to a checkout."""
        lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        with self.server() as address:
            for line in lines:
                words = shlex.split(line.replace("/tmp/", f"{self._folder.parent}/").replace(ADDRESS, address))
                if words[:1] == ["curl"]:
                    self._run(*words, "--silent", "--fail-with-body")
                elif line.startswith(".venv/bin/"):
                    asks_server = words[1] in ("experts", "remap")
                    is_example = words[1] == "examples/test_expert_tracking.py"
                    words += ["--url", address] * asks_server + ["--base-url", address] * is_example
                    self._run(words[0].removeprefix(".venv/bin/"), *words[1:])
        for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            if "from amalgam import" in program:
                self._run("python", "-c", program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help="default: that of dist/ for this interpreter")
    parser.add_argument("--lowest", action="store_true", help="the lowest versions that the metadata allows")
    arguments = parser.parse_args()
    wheel = (arguments.wheel or find_wheel()).resolve()
    pins = lowest_versions(wheel) if arguments.lowest else []
    with tempfile.TemporaryDirectory(prefix="amalgam-") as folder:
        trial = Trial(Path(folder), wheel, pins)
        trial.run_readme((ROOT / "README.md").read_text(encoding="utf-8"))
    print("All of it ran.")


if __name__ == "__main__":
    main()
