"""Kernels of a GPU run on the CPU, in Triton's interpreter: `tests/conftest.py` chooses it for a whole process.

Where there is a card they do not, unless `TRITON_INTERPRET=1` asks for it: other tests of the process are to see the
kernels compiled. Then tests of this folder without the mark `gpu` are skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if HAS_TRITON and IS_INTERPRETED:
    from tests.kernels.triton.interpreter import patch_once

    patch_once()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures: theirs need the interpreter, too."""
    if not IS_INTERPRETED and item.get_closest_marker("gpu") is None:
        pytest.skip("kernels are compiled; TRITON_INTERPRET=1 has them interpreted")
