"""Rules of the weight mapping as they are typed. Must never know: which weights there are."""

from __future__ import annotations

from amalgam.errors import ConfigError


def read_rule(text: str, what: str = "--map") -> dict[str, str]:
    """A rule as a flag has it.

    Args:
        what: was given, for messages.

    Raises:
        ConfigError: it is no rule.
    """
    pattern, _, value = text.rpartition("=")
    source, at, device = value.partition("@")
    if not (pattern and value) or bool(at) != bool(device):
        raise ConfigError(
            f"{what} is {text!r}.",
            remedy="Expected PATTERN=SOURCE, such as 'model.layers.3.*=fp8', PATTERN=SOURCE@DEVICE or PATTERN=@DEVICE.",
        )
    return {"pattern": pattern} | ({"source": source} if source else {}) | ({"device": device} if device else {})
