"""Attention's products on a matrix unit: Intel's AMX, emulated. `test_attention.py` runs there too, as everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import attention, extension
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.step import AttentionBatch, LayerCache
from tests.cases import each_case
from tests.kernels.test_attention import CODES, Case, Layer, assert_as_reference, make, rows_of
from tests.kernels.test_matrix_unit import by_the_manual

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))

# Dimensions that no step of 32 divides, rows of a KV head that 16 does not divide (21, 35 and 63 of 7 heads, 33), odd
# numbers of blocks of keys, latent vectors.
CASES = (
    Case(((3, 40), (1, 7), (20, 20)), 21, 3, 40, 72),
    Case(((5, 130), (1, 49)), 14, 2, 80, 80, block_size=5, window=33),
    Case(((33, 81), (1, 17)), 4, 4, 17, 23, chunk=48),
    Case(((9, 300), (1, 65)), 16, 1, 96, 64, has_sinks=True, softcap=0.7),
    Case(((2, 70), (1, 33)), 18, 1, 576, 512),
    Case(((40, 100),), 4, 2, 64, 128, window=20, has_sinks=True),
)


@pytest.fixture(autouse=True)
def unit(use_isa: Callable[[str], None]) -> None:
    use_isa("amx_emulated")


@pytest.fixture
def one_thread(use_threads: Callable[[int], None]) -> None:
    use_threads(1)


def cases() -> list[Case]:
    """Each type of cache with some of them."""
    types = (None, *CODES)
    return [
        replace(case, query_type=torch.bfloat16, codes=types[(index + shift) % 3])
        for index, case in enumerate(CASES)
        for shift in (0, 1)
    ]


def test_it_means_what_the_reference_says() -> None:
    with each_case() as tried:
        for case in cases():
            with tried(case):
                assert_as_reference(case)


def test_bits_depend_neither_on_neighbours_nor_on_chunks_nor_on_ranges(use_threads: Callable[[int], None]) -> None:
    with each_case() as tried:
        for case in cases():
            with tried(case):
                layer = make(case)
                use_threads(1)
                whole = layer.run()
                use_threads(2)  # a sequence of two ranges of keys is split
                assert torch.equal(layer.run(), whole)
                for sequence, (length, _) in enumerate(case.sequences):
                    start = int(layer.batch.query_starts[sequence])
                    middle, last = length // 2, length - 1
                    for first, end in {(0, 1), (middle, middle + 1), (last, length), (0, middle), (middle, length)}:
                        if first < end:
                            found = rows_of(layer, sequence, first, end).run()
                            assert torch.equal(found, whole[start + first : start + end]), (sequence, first, end)


@pytest.mark.usefixtures("one_thread")
def test_what_is_left_in_memory_is_not_multiplied() -> None:
    """Steps that keys, values or dimensions do not fill are filled with zeros, whatever was there before."""
    for case in cases():
        layer = make(case)
        expected = layer.run()
        spoiled = make(replace(case, sequences=((40, 64),), codes=None))  # a whole tile of keys
        for part in (spoiled.query, spoiled.keys, spoiled.values):
            part.fill_(torch.nan)
        assert spoiled.run().isnan().all()
        assert torch.equal(layer.run(), expected)
        assert expected.isfinite().all()


def scores(query: Tensor, weights: Tensor, cache: LayerCache, layer: Layer) -> Tensor:
    return attention.index_scores(query, weights, cache, layer.batch)


# Then subnormal products, and subnormal keys.
@pytest.mark.parametrize(("of_query", "of_keys"), [(0, 0), (-62, -62), (-66, -66), (60, -126)])
@pytest.mark.parametrize("dim", [64, 40])
def test_scores_are_summed_as_the_manual_says(dim: int, of_query: int, of_keys: int) -> None:
    layer = make(Case(((18, 50),), 1, 1, dim, 8, query_type=torch.bfloat16))
    query = torch.ldexp(layer.query.float(), torch.tensor(of_query)).bfloat16()
    keys = torch.ldexp(layer.keys.float(), torch.tensor(of_keys)).bfloat16()
    position = torch.arange(50)
    slots = layer.batch.block_tables[0][position // 16] * 16 + position % 16
    found = scores(query, torch.ones(18, 1), LayerCache(keys, keys[..., :0]), layer)
    expected = by_the_manual(query[:, 0], keys[slots, 0]).clamp(min=0)
    if of_query >= 0:
        assert expected.count_nonzero() > expected.numel() // 4
    for row in range(18):
        seen = 50 - 18 + row + 1
        assert torch.equal(found[row, :seen], expected[row, :seen])


@pytest.mark.parametrize("codes", [None, *CODES], ids=str)
def test_an_indexers_scores(codes: torch.dtype | None) -> None:
    for heads, dim in ((21, 40), (64, 128), (3, 17)):
        layer = make(Case(((11, 83), (1, 7)), heads, 1, dim, 8, query_type=torch.bfloat16, codes=codes))
        keys, key_scales = layer.cache.keys, layer.cache.key_scales
        empty = None if key_scales is None else key_scales[:, :0]
        cache = LayerCache(keys, keys[..., :0], key_scales, empty)
        weights = torch.randn(12, heads, generator=torch.Generator().manual_seed(heads))
        together = scores(layer.query, weights, cache, layer)
        expected = reference.index_scores(layer.query.float(), weights, cache, layer.batch)
        finite = expected.isfinite()
        torch.testing.assert_close(together[..., : expected.shape[1]][finite], expected[finite], rtol=1e-4, atol=1e-3)
        for row in (0, 5, 10):
            batch = AttentionBatch(
                torch.tensor([0, 1]), torch.tensor([83 - 10 + row]), layer.batch.block_tables[:1], 16
            )
            one = slice(row, row + 1)
            alone = attention.index_scores(layer.query[one], weights[one], cache, batch)
            assert torch.equal(alone[0, : 73 + row], together[row, : 73 + row])


def test_the_emulation_has_the_results_of_the_processor(use_isa: Callable[[str], None]) -> None:
    found = []
    for isa in ("amx", "amx_emulated"):
        use_isa(isa)
        for dim, scale in ((128, 1.0), (40, 2.0**-63), (576, 2.0**63)):
            layer = make(Case(((40, 200),), 1, 1, dim, 8, query_type=torch.bfloat16))
            query = (layer.query.float() * scale).bfloat16()
            cache = LayerCache(layer.keys, layer.keys[..., :0])
            found.append(scores(query, torch.ones(40, 1), cache, layer))
        found.append(make(Case(((20, 130),), 8, 2, 64, 72, query_type=torch.bfloat16)).run())
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert torch.equal(one, other)
