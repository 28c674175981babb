"""Where a model runs."""

from __future__ import annotations

import torch

from amalgam.errors import ConfigError


def choose_device(device_map: str) -> torch.device:
    """`auto` takes CUDA if there is one. A stand-in for a card computes on the processors.

    Raises:
        ConfigError: the asked-for CUDA device does not exist.
    """
    if device_map.startswith("cpu") or (device_map == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(device_map.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ConfigError(
            f"inference.device_map is {device_map!r}, and {torch.cuda.device_count()} CUDA devices are visible.",
            remedy="Choose cpu or auto, or install a CUDA build of PyTorch.",
        )
    return torch.device("cuda", index)
