"""Anthropic's Messages interface, as its clients use it."""

from amalgam.server.api.anthropic.messages import router

__all__ = ["router"]
