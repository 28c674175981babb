from __future__ import annotations

import importlib.metadata
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from amalgam.config.environment import NATIVE_ISA_VARIABLE, NATIVE_ISAS, native_isa_limit
from amalgam.errors import ConfigError, UnsupportedError
from amalgam.kernels.backends.cpu import elementwise, extension
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.reference import operators as reference
from tests.errors import raises

EPS = 1e-6
SIZES = (1, 7, 15, 16, 17, 31, 64, 100, 257, 2048, 4099)
TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def missing_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "amalgam._native", None)
    extension.why_unavailable.cache_clear()
    extension.is_available.cache_clear()
    extension.kernels.cache_clear()
    yield
    extension.why_unavailable.cache_clear()
    extension.is_available.cache_clear()
    extension.kernels.cache_clear()


def sample(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_extension_is_built_where_a_compiler_is() -> None:
    try:
        importlib.metadata.version("amalgam")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("amalgam is not installed")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    if not has_headers or not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler or no Python headers")
    assert extension.why_unavailable() is None


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("x_type", TYPES)
def test_rms_norm_means_what_the_reference_says(
    use_isa: Callable[[str], None], isa: str, x_type: torch.dtype, weight_type: torch.dtype
) -> None:
    use_isa(isa)
    for hidden in SIZES:
        x, weight = sample(5, hidden, dtype=x_type), sample(hidden, dtype=weight_type)
        result = elementwise.rms_norm(x, weight, EPS)
        assert result.dtype == x_type
        torch.testing.assert_close(result, reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_rms_norm_of_a_row_is_the_same_alone_and_in_a_batch(use_isa: Callable[[str], None], isa: str) -> None:
    use_isa(isa)
    for dtype in TYPES:
        for hidden in SIZES:
            x, weight = sample(9, hidden, dtype=dtype), sample(hidden, dtype=dtype)
            alone = [elementwise.rms_norm(x[row : row + 1], weight, EPS) for row in range(9)]
            assert torch.equal(elementwise.rms_norm(x, weight, EPS), torch.cat(alone))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_rms_norm_gives_the_same_bits_on_every_instruction_set(use_isa: Callable[[str], None], isa: str) -> None:
    for dtype in TYPES:
        for hidden in SIZES:
            x, weight = sample(3, hidden, dtype=dtype), sample(hidden, dtype=dtype)
            use_isa("portable")
            expected = elementwise.rms_norm(x, weight, EPS)
            use_isa(isa)
            assert torch.equal(elementwise.rms_norm(x, weight, EPS), expected)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_keeps_special_values(use_isa: Callable[[str], None], isa: str, dtype: torch.dtype) -> None:
    use_isa(isa)
    weight = torch.ones(20, dtype=dtype)
    for value in (0.0, 1e-30, 3e38, float("inf"), float("nan")):
        x = sample(2, 20, dtype=dtype)
        x[0, 19] = value
        result = elementwise.rms_norm(x, weight, EPS)
        torch.testing.assert_close(result, reference.rms_norm(x, weight, EPS), equal_nan=True)


def test_rms_norm_takes_heads_views_and_empty_steps(use_isa: Callable[[str], None]) -> None:
    use_isa("portable")
    weight = sample(24, dtype=torch.float32)
    heads = sample(6, 4, 48, dtype=torch.float32)[..., ::2]
    assert not heads.is_contiguous()
    torch.testing.assert_close(elementwise.rms_norm(heads, weight, EPS), reference.rms_norm(heads, weight, EPS))
    assert elementwise.rms_norm(torch.empty(0, 24), weight, EPS).shape == (0, 24)


def test_rms_norm_refuses_what_it_cannot_read(use_isa: Callable[[str], None]) -> None:
    use_isa("portable")
    for named, x, weight in (
        (("weight", "(9,)", 8), torch.ones(2, 8), torch.ones(9)),
        (("weight", (1, 8), 8), torch.ones(2, 8), torch.ones(1, 8)),
        (("x", "float64", (2, 8)), torch.ones(2, 8, dtype=torch.float64), torch.ones(8)),
        (("weight", "float16"), torch.ones(2, 8), torch.ones(8, dtype=torch.float16)),
        (("x", "CPU"), torch.ones(2, 8, device="meta"), torch.ones(8)),
    ):
        assert not elementwise.supports_rms_norm(x, weight)
        with raises(ValueError, *named):
            elementwise.rms_norm(x, weight, EPS)


@pytest.mark.usefixtures("missing_extension")
def test_without_the_extension_torch_does_the_work() -> None:
    assert not extension.is_available()
    reason = extension.why_unavailable()
    assert reason is not None
    assert "compiler" in reason
    assert "pip install -e ." in reason
    x, weight = sample(2, 8, dtype=torch.float32), sample(8, dtype=torch.float32)
    assert torch.equal(CpuOperators.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    with raises(UnsupportedError, "pip install -e ."):
        extension.isa()


def test_limit_on_the_instruction_set_comes_from_the_environment() -> None:
    assert native_isa_limit({}) is None
    assert native_isa_limit({NATIVE_ISA_VARIABLE: "avx2"}) == "avx2"
    with raises(ConfigError, "AMALGAM_NATIVE_ISA", "sse", "portable", "avx2", "avx512"):
        native_isa_limit({NATIVE_ISA_VARIABLE: "sse"})
