"""Attention in Triton, interpreted, means what the reference says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.step import LayerCache
from tests.kernels.test_attention import Case, in_float32, make, rows_of

pytest.importorskip("triton")

from amalgam.kernels.backends.triton import attention, batches
from amalgam.kernels.backends.triton.launching import IS_INTERPRETED

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Sequences of more than eight tokens are prompts. float32: sums in another order. Otherwise: weights and results are
# rounded once each.
BOUNDS = {FLOAT: 2e-6, BF16: 2**-7, HALF: 2**-10}
CASES = [
    Case(sequences=((9, 40), (1, 7), (2, 2))),
    Case(sequences=((1, 1),), codes=FP8),
    Case(sequences=((1, 130), (9, 9)), heads=8, kv_heads=1, key_dim=128, value_dim=128, query_type=BF16),
    Case(sequences=((10, 70), (1, 63)), heads=3, kv_heads=3, key_dim=80, value_dim=80, block_size=4, query_type=HALF),
    Case(sequences=((9, 30), (1, 129)), heads=16, kv_heads=1, key_dim=192, value_dim=128, query_type=BF16, codes=FP8),
    Case(sequences=((9, 17), (1, 40)), heads=6, kv_heads=3, key_dim=17, value_dim=23, block_size=5, codes=INT8),
    Case(sequences=((1, 200), (20, 20)), chunk=48, query_type=BF16, codes=INT8),
    Case(sequences=((12, 70), (1, 70)), heads=7, kv_heads=1, window=33, query_type=BF16, cache_type=HALF),
    Case(sequences=((1, 100), (9, 20)), window=1, has_sinks=True, query_type=HALF, codes=FP8),
    Case(sequences=((1, 200), (9, 70)), window=64, has_sinks=True, key_dim=32, value_dim=32, query_type=BF16),
    Case(sequences=((1, 200), (9, 17)), key_dim=17, value_dim=23, window=150, has_sinks=True, softcap=1.5),
]


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference(case: Case) -> None:
    layer = make(case)
    assert attention.supports(layer.query, layer.cache, layer.batch)
    result = layer.run(attention.paged_attention)
    assert result.dtype == case.query_type
    bound = BOUNDS[case.query_type]
    torch.testing.assert_close(result.float(), in_float32(layer), rtol=bound, atol=bound)


@pytest.mark.parametrize(("latent", "query_type", "codes"), [(32, FLOAT, FP8), (32, BF16, None), (24, FLOAT, None)])
def test_values_that_are_part_of_the_keys(latent: int, query_type: torch.dtype, codes: torch.dtype | None) -> None:
    layer = make(Case(((1, 150), (9, 20)), heads=5, kv_heads=1, key_dim=latent + 8, query_type=query_type, codes=codes))
    cache = layer.cache
    cache = LayerCache(cache.keys, cache.keys[..., :latent], cache.key_scales, cache.key_scales)
    wide = cache if codes else LayerCache(cache.keys.float(), cache.values.float())
    result = attention.paged_attention(layer.query, cache, layer.batch, scale=0.2)
    expected = reference.paged_attention(layer.query.float(), wide, layer.batch, scale=0.2)
    bound = BOUNDS[query_type]
    torch.testing.assert_close(result.float(), expected, rtol=bound, atol=bound)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    layer = make(Case(((2, 200), (1, 129), (12, 30)), heads=2, kv_heads=1, key_dim=32, value_dim=32))
    whole = layer.run(attention.paged_attention)
    # A stream's token without those behind it; a part of a prompt that is cut elsewhere.
    for sequence, first, last, start in ((0, 0, 1, 0), (1, 0, 1, 2), (2, 0, 11, 3)):
        alone = rows_of(layer, sequence, first, last).run(attention.paged_attention)
        assert torch.equal(alone, whole[start + first : start + last])


def test_many_tokens_of_streams_are_launched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(Case(((3, 140), (1, 129), (1, 2)), heads=2, kv_heads=1, key_dim=16, value_dim=16))
    whole = layer.run(attention.paged_attention)
    monkeypatch.setattr(batches, "MOST_TILES", 2)
    again = replace(layer, batch=replace(layer.batch))
    assert [part.shape for part in batches.tiles_of(again.batch).single] == [(4, 2), (4, 2), (4, 1)]
    assert torch.equal(again.run(attention.paged_attention), whole)


def test_small_values_and_float16() -> None:
    """The product of a probability and a value's scale lies below float16's range, and the result hardly does."""
    layer = make(Case(((1, 150), (9, 40)), key_dim=16, value_dim=16, query_type=HALF, codes=INT8))
    layer = replace(layer, values=layer.values * 2.0**-13)
    result, expected = layer.run(attention.paged_attention).float(), in_float32(layer)
    torch.testing.assert_close(result, expected, rtol=0, atol=2**-10 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or IS_INTERPRETED, reason="needs a CUDA device, TRITON_INTERPRET=0")
@pytest.mark.parametrize("case", CASES)
def test_as_the_reference_on_a_card(case: Case) -> None:
    layer, card = make(case), torch.device("cuda")
    cache = LayerCache(*(None if part is None else part.to(card) for part in layer.cache))  # type: ignore[arg-type]
    batch = replace(layer.batch, block_tables=layer.batch.block_tables.to(card))
    result = attention.paged_attention(
        layer.query.to(card),
        cache,
        batch,
        scale=case.key_dim**-0.5,
        window=case.window,
        sinks=None if layer.sinks is None else layer.sinks.to(card),
        softcap=case.softcap,
        chunk=case.chunk,
    )
    bound = 2 * BOUNDS[case.query_type]
    torch.testing.assert_close(result.float().cpu(), in_float32(layer), rtol=bound, atol=bound)


def test_what_is_not_taken() -> None:
    layer = make(Case(((1, 3),)))
    assert not attention.supports(layer.query.double(), layer.cache, layer.batch)
    other = layer.cache._replace(values=layer.cache.values.half())
    assert not attention.supports(layer.query, other, layer.batch)
    wide = make(replace(layer.case, value_dim=513))
    assert not attention.supports(wide.query, wide.cache, wide.batch)
