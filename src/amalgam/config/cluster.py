"""Settings of several replicas behind one address: section `cluster`."""

from __future__ import annotations

from pydantic import Field, model_validator

from amalgam.config.fields import Section


class ClusterSettings(Section):
    """Several replicas behind one address: `amalgam deploy ray`."""

    replicas: int = Field(default=2, ge=1, le=1024)
    """How many there are, where max_replicas does not let the load decide; otherwise how many to begin with."""
    min_replicas: int = Field(default=1, ge=1, le=1024)
    """Fewest, where the load decides."""
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    """Most replicas; the load decides how many there are. None: it does not, `replicas` are there all the time."""
    target_requests: float | None = Field(default=None, gt=0)
    """Requests, waiting and running, that a replica should have. None: three quarters of inference.max_batch_size."""
    target_kv: float = Field(default=0.8, gt=0, le=1)
    """Share of a replica's KV cache that should be in use at most."""
    upscale_seconds: float = Field(default=10.0, ge=0, le=86400)
    """How long the load must ask for more replicas before there are more."""
    downscale_seconds: float = Field(default=120.0, ge=0, le=86400)
    """How long it must ask for fewer before there are fewer."""
    max_imbalance: int = Field(default=8, ge=0, le=2**20)
    """Requests more than the idlest replica that one may have and still get those whose beginning it knows."""
    proxies: bool | None = None
    """Whether Ray Serve's proxies take requests, on every machine of the cluster, and hand them to the gateway. Without
    them the gateway takes requests itself, on its machine, which is faster. None: they do if `--address` is given."""
    health_seconds: float = Field(default=2.0, gt=0, le=3600)
    """How often a replica is asked whether it lives."""

    @model_validator(mode="after")
    def _check_bounds(self) -> ClusterSettings:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below min_replicas ({self.min_replicas})")
        return self
