"""How many threads compute, and where: from settings and from what this process may use."""

from __future__ import annotations

import torch

from amalgam.base.processors import usable_threads
from amalgam.config.engine import EngineSettings
from amalgam.kernels.backends.cpu.threads import arrange


def set_threads(engine: EngineSettings) -> None:
    """For the whole process. Before weights are packed, because it also says where they lie."""
    torch.set_num_threads(choose_num_threads(engine.num_threads))
    arrange(torch.get_num_threads(), engine.numa, engine.pin_threads)


def choose_num_threads(wanted: int | None) -> int:
    """As many as are wanted, else as many as this process may use cores.

    But no more then than PyTorch has, which is what OMP_NUM_THREADS or the program around us says, or all processors.
    """
    return wanted or min(usable_threads(), torch.get_num_threads())
