from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from amalgam.config.environment import NATIVE_ISA_VARIABLE, NATIVE_ISAS
from amalgam.kernels.backends.cpu import extension


def supported_isas() -> list[str]:
    """Instruction sets to test with; test_extension.py tells by its skipped tests which others there are."""
    if not extension.is_available():
        return list(NATIVE_ISAS[:1])  # which is skipped, and says why
    from amalgam import _native

    return [isa for isa in NATIVE_ISAS if isa in _native.supported_isas()]


@pytest.fixture
def use_isa(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Forces an instruction set the way a user does; skips where the processor or the build lacks it."""

    def use(isa: str) -> None:
        if not extension.is_available():
            pytest.skip(str(extension.why_unavailable()))
        monkeypatch.setenv(NATIVE_ISA_VARIABLE, isa)
        extension.kernels.cache_clear()
        if extension.isa() != isa:
            pytest.skip(f"this processor has no {isa}")

    yield use
    extension.kernels.cache_clear()


@pytest.fixture(params=supported_isas())
def isa(request: pytest.FixtureRequest, use_isa: Callable[[str], None]) -> str:
    """Each instruction set in turn, in use."""
    use_isa(request.param)
    return str(request.param)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, and the largest integers."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
