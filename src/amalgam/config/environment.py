"""What the environment says that is no setting: where state is kept, how far the kernels may go, how threads wait.

In: environment variables. Out: what they mean. This and `reading.py` are the only modules that read the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from amalgam.errors import ConfigError, describe

NATIVE_ISA_VARIABLE = "AMALGAM_NATIVE_ISA"
NATIVE_ISAS = ("amx_emulated", "portable", "avx2", "avx512_vnni", "avx512", "amx")  # slowest first


def state_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where a user's own files are kept between runs, as the XDG base directories have it. It need not exist."""
    environment = os.environ if environ is None else environ
    given = environment.get("XDG_STATE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path("~/.local/state").expanduser()) / "amalgam"


def native_isa_limit(environ: Mapping[str, str] | None = None) -> str | None:
    """Highest instruction set that the native kernels may use, from `AMALGAM_NATIVE_ISA`; None: no limit.

    A limit above what the processor has changes nothing. Not a setting, because it is for testing and for narrowing
    down a fault, and kernels are chosen before settings are read.

    Raises:
        ConfigError: the value is none of `NATIVE_ISAS`.
    """
    limit = (os.environ if environ is None else environ).get(NATIVE_ISA_VARIABLE)
    if limit == "":
        return None
    if limit is not None and limit not in NATIVE_ISAS:
        raise ConfigError(f"{NATIVE_ISA_VARIABLE} is {describe(limit)}.", remedy=f"Allowed: {', '.join(NATIVE_ISAS)}.")
    return limit


def let_threads_sleep() -> None:
    """Have PyTorch's threads sleep while they wait for each other, unless the environment says how they wait.

    Only before PyTorch is loaded, for its OpenMP reads it then. It runs what the compiled kernels do not have, in many
    short turns. Threads that spin in between take the cores from the kernels' own, and where another program has one
    of the cores, a step took five times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def set_variables(variables: Mapping[str, str]) -> None:
    """Say to a library, and to the processes that it starts, what the environment does not say already."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
