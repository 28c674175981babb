"""Settings of plans for a budget: section `planning`."""

from __future__ import annotations

from pydantic import Field

from amalgam.config.fields import Section, UserPath


class AutoplanSettings(Section):
    """Plans that follow the traffic while the server runs. Needs expert statistics and measured sensitivities."""

    enabled: bool = False
    """Whether weights are taken from other sources by themselves when the use of the experts changes."""
    frozen: bool = False
    """Start without changing anything: what would be proposed is told all the same. `POST /autoplan` changes it."""
    sensitivities: UserPath = ""
    """Folder that `amalgam evaluate --sensitivity` wrote. Empty: the latest of these weights in the user's own."""
    budget: str = Field(default="", max_length=64)
    """What a plan may take: 40GB (of weights), 4.5bpw. Empty: what the weights of the first plan take."""
    memory: str = Field(default="", max_length=64)
    """What weights may take while a candidate and the reference are there too. Empty: 85% of the memory."""
    interval_seconds: float = Field(default=60.0, ge=0.05, le=86400)
    """How often the traffic is looked at."""
    short_minutes: float = Field(default=5.0, gt=0, le=7 * 24 * 60)
    """The traffic that a plan is made for."""
    long_minutes: float = Field(default=60.0, gt=0, le=7 * 24 * 60)
    """The traffic that it is compared with, at most statistics.history_minutes."""
    min_tokens: int = Field(default=2048, ge=256, le=2**40)
    """Tokens that the short window needs before anything is proposed."""
    drift: float = Field(default=0.02, ge=0, le=1)
    """Jensen-Shannon divergence (bits, the mean over layers) from which a new plan is tried. 0: always."""
    min_gain: float = Field(default=0.05, ge=0, lt=1)
    """Share of the KL divergence that a new plan has to remove, with 95% confidence."""
    max_swaps_per_hour: int = Field(default=4, ge=0, le=3600)
    """Most changes of the weights in any hour."""
    sampled_share: float = Field(default=0.25, ge=0, le=1)
    """Share of the requests whose tokens are kept for comparing plans. They are in memory only."""
    sampled_tokens: int = Field(default=4096, ge=2048, le=2**24)
    """Most tokens that are kept, 128 of a request; the oldest make room. Comparing takes time in proportion."""
    max_share: float = Field(default=0.1, gt=0, le=1)
    """Most of one core's time that comparing may take."""


class PlanningSettings(Section):
    """Plans for a budget."""

    autoplan: AutoplanSettings = AutoplanSettings()
    """Plans that follow the traffic while the server runs."""
