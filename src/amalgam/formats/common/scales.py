"""Scales as several formats store them: floating ones, and powers of two (E8M0, OCP Microscaling 1.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.errors import CheckpointError
from amalgam.formats.contract import StoredWeight, owned

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E8M0 = (torch.uint8, torch.float8_e8m0fnu)
MX_GROUP = 32  # inputs that share a power of two


def powers(stored: StoredWeight, role: str, tensor: Tensor, largest: int) -> Tensor:
    """E8M0 scales as float8_e8m0fnu.

    Raises:
        CheckpointError: one is NaN (255), or its weights would not be finite.
    """
    raw = owned(tensor.view(torch.uint8))
    if raw.numel() and int(raw.max()) > largest:
        raise CheckpointError(
            f"Tensor {stored.parts[role].name!r} of weight {stored.name!r} holds the scale 2^{int(raw.max()) - 127}"
            f"{', which is NaN' if int(raw.max()) == 255 else ''}, in {stored.parts[role].file.name}.",
            remedy=f"Largest that is finite in float32: 2^{largest - 127}. The file is damaged: download it again.",
        )
    return raw.view(torch.float8_e8m0fnu)
