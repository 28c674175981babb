"""Kernels of a GPU run on the CPU, in Triton's interpreter: `tests/conftest.py` chooses it for a whole process.

Where there is a card they do not, unless `TRITON_INTERPRET=1` asks for it: other tests of the process are to see the
kernels compiled. Then tests of this folder without the mark `gpu` are skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """Behind the hook that chooses: files of this folder that are named on the command line bring it along first."""
    if importlib.util.find_spec("triton") is not None and is_interpreted():
        from tests.kernels.triton.interpreter import patch_once

        patch_once()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures: theirs need the interpreter, too."""
    if not is_interpreted() and item.get_closest_marker("gpu") is None:
        pytest.skip("kernels are compiled; TRITON_INTERPRET=1 has them interpreted")


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
