"""Weights while they serve: what is in use, what a change would take, changes, names and pins, trials of candidates."""

from amalgam.server.api.weights import changes, trials, updates, versions
from amalgam.server.api.weights.answers import LogicalName, RemapAnswer, remap_answer

ROUTERS = (updates.router, versions.router, changes.router, trials.router)

__all__ = ["ROUTERS", "LogicalName", "RemapAnswer", "remap_answer"]
