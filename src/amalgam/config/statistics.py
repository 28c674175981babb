"""Settings of expert statistics: section `statistics`."""

from __future__ import annotations

from pydantic import Field

from amalgam.config.fields import Section, UserPath


class StatisticsSettings(Section):
    """Expert statistics."""

    enabled: bool = True
    """Count which experts the traffic activates."""
    bucket_seconds: float = Field(default=5.0, gt=0, le=3600)
    """Resolution of the time windows."""
    history_minutes: float = Field(default=60.0, gt=0, le=7 * 24 * 60)
    """Longest time window."""
    recent_activations: int = Field(default=256, ge=0, le=65536)
    """How many recent activations to keep."""
    half_life_minutes: float = Field(default=5.0, gt=0, le=7 * 24 * 60)
    """Half-life of the decaying rates."""
    max_labels: int = Field(default=64, ge=0, le=1024)
    """How many labels (`domain`) are counted apart; a request with one more is refused."""
    pair_sampling: int = Field(default=8, ge=0, le=2**20)
    """Co-activation and transitions look at one token in so many; 1: at all, 0: at none."""
    trace_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory for the traces of requests that ask for their routed experts; more are refused with 503."""
    reference: UserPath = ""
    """A saved set that `drift` compares with. Empty: what was counted since the last reset."""
    file: UserPath = ""
    """File that keeps the statistics of one process across restarts (.npz or safetensors). Empty: they end with it."""
    save_seconds: float = Field(default=300.0, ge=1, le=7 * 86400)
    """How often `file` is written; it is written at the end too."""
