"""What quantizing did: bytes and errors by role, what each expert saw, what was taken along."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RoleReport:
    """What quantizing did to the weights of one role. `error` is the root mean square of (new - old) / old, overall."""

    num_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass
class QuantizeReport:
    """What `quantize_checkpoint` wrote.

    Attributes:
        expert_tokens: expert (`layers.3.mlp.experts.17`) → tokens that the router sent to it while it was calibrated,
            and those that it was shown.
        rounded: weights that no token reached, so that they were rounded instead.
        num_tokens: of the calibration texts; 0 without.
        carried: weights beside the model's own, copied as they are.
        left_out_tensors, left_out_files: of the checkpoint, not in the folder.
        config_changes: keys of config.json that say something else now, besides the quantization.
        num_resumed: files that an earlier, interrupted run had finished.
        tool: another tool that has done it, with its version; empty: we have.
        moved: weights beside the quantized ones that the tool has changed; what they belong to has to stay together.
    """

    folder: Path
    format: str
    method: str = "round"
    roles: dict[str, RoleReport] = field(default_factory=dict)
    expert_tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    num_tokens: int = 0
    carried: list[str] = field(default_factory=list)
    left_out_tensors: list[str] = field(default_factory=list)
    left_out_files: list[str] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    num_resumed: int = 0
    tool: str = ""
    moved: list[str] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(role.bytes_before for role in self.roles.values())

    @property
    def bytes_after(self) -> int:
        return sum(role.bytes_after for role in self.roles.values())

    def count(self, role: str, before: int, after: int) -> RoleReport:
        """One weight more."""
        found = self.roles.setdefault(role, RoleReport())
        found.num_weights += 1
        found.bytes_before += before
        found.bytes_after += after
        return found

    def progress(self) -> dict[str, Any]:
        """What has been counted so far, as JSON values."""
        roles = {name: asdict(role) for name, role in self.roles.items()}
        return {"roles": roles, "expert_tokens": self.expert_tokens, "rounded": self.rounded}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on from what `progress` gave."""
        self.roles = {name: RoleReport(**role) for name, role in progress["roles"].items()}
        self.expert_tokens = {name: (tokens[0], tokens[1]) for name, tokens in progress["expert_tokens"].items()}
        self.rounded = list(progress["rounded"])
