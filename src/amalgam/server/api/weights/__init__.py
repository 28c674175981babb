"""Weights while they serve: what is in use, what a change would take, changes, names and pins."""

from amalgam.server.api.weights import updates, versions
from amalgam.server.api.weights.answers import LogicalName, RemapAnswer, remap_answer

ROUTERS = (updates.router, versions.router)

__all__ = ["ROUTERS", "LogicalName", "RemapAnswer", "remap_answer"]
