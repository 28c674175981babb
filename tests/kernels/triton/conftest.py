"""Kernels of a GPU run on the CPU, in Triton's interpreter: chosen before Triton is imported, for a whole process."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "1":
    from tests.kernels.triton.interpreter import patch_once

    patch_once()
