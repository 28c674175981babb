from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def brief_configs() -> Iterator[None]:
    """A class's configuration writes itself down for a message that nobody reads, in half the time of its making."""
    from transformers import PreTrainedConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedConfig, "__repr__", object.__repr__)
        yield
