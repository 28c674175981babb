from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import attention, extension
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.step import AttentionBatch, CachedAttention, LayerCache
from tests.cases import each_case
from tests.errors import raises
from tests.kernels.conftest import supported_isas

TYPES = (torch.float32, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)


@pytest.fixture(params=supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn, in use."""
    use_isa(monkeypatch, request.param)
    return str(request.param)


def use_isa(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    if not extension.is_available():
        pytest.skip(str(extension.why_unavailable()))
    from amalgam import _native

    if isa not in _native.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(extension, "isa", lambda: isa)


@dataclass(frozen=True)
class Case:
    """Sequences (rows of this step, context) and the sizes of one layer; `cache_type` is the query's if left out.

    codes: what the values of the cache become when attention reads them.
    """

    sequences: tuple[tuple[int, int], ...] = ((3, 40), (1, 7), (20, 20))
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    block_size: int = 16
    window: int | None = None
    has_sinks: bool = False
    softcap: float | None = None
    chunk: int | None = None
    query_type: torch.dtype = torch.float32
    cache_type: torch.dtype | None = None
    codes: torch.dtype | None = None


@dataclass(frozen=True)
class Layer:
    query: Tensor
    keys: Tensor
    values: Tensor
    batch: AttentionBatch
    sinks: Tensor | None
    case: Case
    given: LayerCache | None = None  # made of keys and values where it is left out

    def run(self, function: Callable[..., Tensor] = attention.paged_attention) -> Tensor:
        return function(
            self.query,
            self.cache,
            self.batch,
            scale=self.case.key_dim**-0.5,
            window=self.case.window,
            sinks=self.sinks,
            softcap=self.case.softcap,
            chunk=self.case.chunk,
        )

    @functools.cached_property
    def cache(self) -> LayerCache:
        """Where the case asks for codes, quantized by the reference."""
        dtype = self.case.codes
        if self.given is not None:
            return self.given
        if dtype is None:
            return LayerCache(self.keys, self.values)
        (keys, key_scales), (values, value_scales) = (
            reference.to_codes(rows, dtype) for rows in (self.keys, self.values)
        )
        return LayerCache(keys, values, key_scales, value_scales)


def make(case: Case, seed: int = 0) -> Layer:
    """Scattered blocks; every slot that no sequence has written to holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // case.block_size) for _, context in case.sequences]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int64)
    cache_type = case.cache_type or case.query_type
    keys = torch.full((num_blocks * case.block_size, case.kv_heads, case.key_dim), torch.nan, dtype=cache_type)
    values = torch.full((num_blocks * case.block_size, case.kv_heads, case.value_dim), torch.nan, dtype=cache_type)
    for row, ((_, context), ids) in enumerate(zip(case.sequences, order.split([*counts, 3])[:-1], strict=True)):
        tables[row, : len(ids)] = ids
        slots = (ids[:, None] * case.block_size + torch.arange(case.block_size)).flatten()[:context]
        keys[slots] = torch.randn(context, *keys.shape[1:], generator=generator).to(cache_type)
        values[slots] = torch.randn(context, *values.shape[1:], generator=generator).to(cache_type)
    lengths = torch.tensor([length for length, _ in case.sequences])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    contexts = torch.tensor([context for _, context in case.sequences])
    query = torch.randn(int(starts[-1]), case.heads, case.key_dim, generator=generator).to(case.query_type)
    sinks = torch.randn(case.heads, generator=generator) if case.has_sinks else None
    return Layer(query, keys, values, AttentionBatch(starts, contexts, tables, case.block_size), sinks, case)


def rows_of(layer: Layer, sequence: int, first: int, last: int) -> Layer:
    """Rows [first, last) of one sequence alone, as a step of their own; later keys are not there yet."""
    start, stop = layer.batch.query_starts[sequence : sequence + 2].tolist()
    context = int(layer.batch.context_lengths[sequence]) - (stop - start) + last
    table = layer.batch.block_tables[sequence : sequence + 1]
    block = layer.batch.block_size
    position = torch.arange(context, int(layer.batch.context_lengths[sequence]))
    slots = table[0][position // block] * block + position % block
    kept = [part if part is None else part.clone() for part in layer.cache]
    for part in kept[2:] if layer.case.codes else kept[:2]:  # scales, where codes cannot be NaN
        assert part is not None
        part[slots] = torch.nan
    batch = AttentionBatch(torch.tensor([0, last - first]), torch.tensor([context]), table, block)
    query = layer.query[start + first : start + last]
    return replace(layer, query=query, batch=batch, given=LayerCache(*kept))


def in_float32(layer: Layer) -> Tensor:
    """What the reference makes of the same values, or the same codes, without rounding."""
    wide = replace(layer, query=layer.query.float(), keys=layer.keys.float(), values=layer.values.float())
    return wide.run(reference.paged_attention)


@functools.cache
def expected_of(case: Case, seed: int) -> Tensor:
    """Computed once for all instruction sets."""
    return in_float32(make(case, seed))


def assert_as_reference(case: Case, seed: int = 0) -> None:
    """Close to float32 over the same values; products in bfloat16 round the softmax's weights."""
    result = make(case, seed).run()
    assert result.dtype == case.query_type
    tolerance = 1e-5 if case.query_type == torch.float32 else 1e-2
    torch.testing.assert_close(result.float(), expected_of(case, seed), rtol=tolerance, atol=tolerance)


CASES = [
    Case(),
    Case(sequences=((1, 1),)),
    Case(sequences=((1, 300), (1, 1), (1, 64), (1, 65)), heads=8, kv_heads=1, key_dim=128, value_dim=128),
    Case(sequences=((7, 130), (1, 63)), heads=5, kv_heads=5, key_dim=80, value_dim=80, block_size=4),
    Case(sequences=((33, 90), (1, 129)), heads=16, kv_heads=1, key_dim=192, value_dim=128, block_size=64),
    Case(sequences=((5, 17), (1, 400), (70, 70)), chunk=48),
    Case(sequences=((40, 300), (1, 64)), heads=8, kv_heads=1, key_dim=128, value_dim=128, chunk=64),
    Case(sequences=((1, 70), (2, 70)), heads=9, kv_heads=3, key_dim=96, value_dim=96, block_size=32),
    Case(sequences=((5, 17), (1, 40)), heads=6, kv_heads=3, key_dim=17, value_dim=23, block_size=5),
    Case(sequences=((70, 200),), heads=7, kv_heads=1, window=33),
    Case(sequences=((1, 200), (3, 150)), window=1, has_sinks=True),
    Case(sequences=((1, 200), (40, 150)), heads=8, window=64, has_sinks=True, key_dim=32, value_dim=32),
    Case(sequences=((1, 300), (20, 90)), heads=8, kv_heads=1, key_dim=128, value_dim=128, softcap=0.7),
    Case(sequences=((5, 17), (1, 400)), key_dim=17, value_dim=23, window=33, has_sinks=True, softcap=1.5),
]


@pytest.mark.parametrize("query_type", TYPES)
@pytest.mark.usefixtures("isa")
def test_attention_means_what_the_reference_says(query_type: torch.dtype) -> None:
    with each_case() as tried:
        for case, cache_type in product(CASES, (*TYPES, torch.float16)):
            with tried(case, cache_type):
                assert_as_reference(replace(case, query_type=query_type, cache_type=cache_type))


@pytest.mark.parametrize("query_type", TYPES)
@pytest.mark.usefixtures("isa")
def test_attention_over_codes_means_what_the_reference_says(query_type: torch.dtype) -> None:
    with each_case() as tried:
        for case, codes in product(CASES, CODES):
            with tried(case, codes):
                assert_as_reference(replace(case, query_type=query_type, codes=codes))


@pytest.mark.usefixtures("isa")
def test_attention_of_random_shapes() -> None:
    generator = torch.Generator().manual_seed(1)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(20):
        sequences = []
        for _ in range(pick(1, 2, 5)):
            length = pick(1, 1, 2, 9, 40)
            sequences.append((length, length + pick(0, 1, 15, 16, 63, 100)))
        kv_heads = pick(1, 2, 3)
        case = Case(
            sequences=tuple(sequences),
            heads=kv_heads * pick(1, 2, 3, 4, 7, 8, 16),
            kv_heads=kv_heads,
            key_dim=pick(8, 32, 64, 80, 96, 128),
            value_dim=pick(8, 32, 64, 80, 96, 128),
            block_size=pick(4, 8, 16, 48, 64),
            window=pick(0, 0, 1, 20, 64) or None,
            has_sinks=bool(pick(0, 1)),
            query_type=TYPES[pick(0, 1)],
            codes=(None, *CODES)[pick(0, 0, 1, 2)],
        )
        assert_as_reference(case, seed)


@pytest.mark.parametrize("query_type", TYPES)
@pytest.mark.usefixtures("isa")
def test_attention_over_many_ranges_of_keys(query_type: torch.dtype) -> None:
    """Contexts at and around the places where the work is cut."""
    sequences = ((1, 1024), (1, 1025), (1, 2048), (1, 3100), (20, 2060))
    case = Case(sequences=sequences, heads=4, kv_heads=1, key_dim=32, value_dim=32, query_type=query_type)
    assert_as_reference(case)
    assert_as_reference(replace(case, window=1030, has_sinks=True))


@pytest.mark.parametrize(
    ("shared", "window", "codes"),
    [
        (1, None, None),
        (8, None, None),
        (8, 50, None),
        (2, 1500, None),
        (8, 50, torch.int8),
        (1, None, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
def test_bits_depend_neither_on_chunks_nor_on_neighbours(
    dtype: torch.dtype,
    codes: torch.dtype | None,
    shared: int,
    window: int | None,
    use_threads: Callable[[int], None],
) -> None:
    sequences = ((1, 37), (90, 1100), (1, 2100), (90, 90))
    case = Case(sequences, 2 * shared, 2, 32, 32, window=window, has_sinks=window == 50, query_type=dtype, codes=codes)
    layer = make(case)
    use_threads(1)
    whole = layer.run()
    use_threads(2)
    assert torch.equal(layer.run(), whole)
    starts = layer.batch.query_starts.tolist()
    for sequence, (length, _) in enumerate(sequences):
        expected = whole[starts[sequence] : starts[sequence + 1]]
        for chunk in (1, 23):
            if chunk == 1:  # as if each were generated
                cuts = sorted({0, length // 2, length - 1})
                parts = [(cut, cut + 1) for cut in cuts]
            else:
                parts = [(first, min(first + chunk, length)) for first in range(0, length, chunk)]
            for first, last in parts:
                assert torch.equal(rows_of(layer, sequence, first, last).run(), expected[first:last])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("codes", [None, *CODES])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
def test_packed_and_direct_tiles_give_the_same_bits(
    dtype: torch.dtype, codes: torch.dtype | None, softcap: float | None
) -> None:
    """One row of 8 heads is read straight from the cache, many rows go through packed tiles; runs and single slots."""
    case = Case(((40, 700),), 8, 1, 128, 128, query_type=dtype, codes=codes, softcap=softcap)
    layer = make(case)
    whole = layer.run()
    scattered = make(replace(case, block_size=4))
    position = torch.arange(700)

    def slots_of(other: Layer) -> Tensor:
        return other.batch.block_tables[0][position // other.case.block_size] * other.case.block_size + (
            position % other.case.block_size
        )

    scattered.keys[slots_of(scattered)] = layer.keys[slots_of(layer)]
    scattered.values[slots_of(scattered)] = layer.values[slots_of(layer)]
    scattered = replace(scattered, query=layer.query)
    assert torch.equal(scattered.run(), whole)
    for row in (0, 13, 39):
        assert torch.equal(rows_of(layer, 0, row, row + 1).run(), whole[row : row + 1])
        assert torch.equal(rows_of(scattered, 0, row, row + 1).run(), whole[row : row + 1])


@pytest.mark.parametrize("codes", [None, *CODES])
@pytest.mark.parametrize("dtype", TYPES)
def test_vectors_of_any_width_give_the_same_bits(
    dtype: torch.dtype, codes: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(Case(((40, 200), (1, 1100)), 8, 2, 64, 96, query_type=dtype, codes=codes))
    use_isa(monkeypatch, "avx2")
    expected = layer.run()
    wider = [isa for isa in supported_isas() if isa.startswith("avx512")]
    if not wider:
        pytest.skip("this processor has no AVX-512")
    for isa in wider:
        use_isa(monkeypatch, isa)
        assert torch.equal(layer.run(), expected)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.usefixtures("isa")
def test_latents_are_views_of_codes(codes: torch.dtype) -> None:
    """As latent attention stores them: values are the first part of the keys, with their scales."""
    layer = make(Case(((4, 50),), 4, 1, 48, 48, codes=codes))
    cache = layer.cache
    views = cache._replace(values=cache.keys[..., :32], value_scales=cache.key_scales)
    found = attention.paged_attention(layer.query, views, layer.batch, scale=0.25)
    torch.testing.assert_close(found, reference.paged_attention(layer.query, views, layer.batch, scale=0.25))


@pytest.mark.usefixtures("isa")
def test_attention_reads_views_of_one_cache() -> None:
    """As latent attention stores it: values are the first part of the keys; and queries of a wider tensor."""
    layer = make(Case(((4, 50),), 4, 1, 48, 48))
    values = layer.keys[..., :32]
    wide = torch.cat((layer.query, layer.query), -1)[..., :48]
    assert not values.is_contiguous() and not wide.is_contiguous()
    viewed = replace(layer, query=wide, values=values)
    assert torch.equal(viewed.run(), replace(layer, values=values.contiguous()).run())
    torch.testing.assert_close(viewed.run(), viewed.run(reference.paged_attention))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
def test_large_scores_and_special_values(dtype: torch.dtype) -> None:
    layer = make(Case(((5, 100),), query_type=dtype))
    large = replace(layer, query=layer.query * 100)  # scores in the hundreds have few bits behind the point
    torch.testing.assert_close(large.run().float(), in_float32(large), rtol=1e-2, atol=1e-2)
    layer.query[2, 1, 3] = torch.nan
    result = layer.run()
    assert result[2, 1].isnan().all()
    result[2, 1] = 0
    assert not result.isnan().any()


@pytest.mark.usefixtures("isa")
def test_attention_of_an_empty_step() -> None:
    layer = make(Case(((1, 5),)))
    batch = AttentionBatch(torch.tensor([0]), torch.empty(0, dtype=torch.int64), torch.zeros(0, 1).long(), 16)
    assert replace(layer, query=layer.query[:0], batch=batch).run().shape == (0, 4, 64)


def test_attention_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_isa(monkeypatch, "portable")
    layer = make(Case())
    broken = [
        (replace(layer, query=layer.query[1:]), ("query", 23, 24)),
        (replace(layer, query=layer.query[:, :3]), ("keys", 3)),
        (replace(layer, query=layer.query.double()), ("query", "float64", "bfloat16")),
        (replace(layer, keys=layer.keys[:, :1]), ("values", tuple(layer.values.shape), 1)),
        (replace(layer, keys=layer.keys[:8], values=layer.values[:8]), ("keys", 8, 144)),
        (replace(layer, sinks=torch.zeros(3)), ("sinks", "(3,)", 4)),
        (replace(layer, case=replace(layer.case, window=0)), ("window", 0)),
        (replace(layer, case=replace(layer.case, softcap=-1.0)), ("softcap", "-1.000000")),
        (replace(layer, case=replace(layer.case, chunk=0)), ("chunk", 0)),
    ]
    for wrong, named in broken:
        with raises(ValueError, *named):
            wrong.run()
    batch = layer.batch
    contradictions = [
        replace(batch, context_lengths=batch.context_lengths * 50),
        replace(batch, context_lengths=batch.context_lengths * 0),
        replace(batch, block_tables=batch.block_tables - 100),
        replace(batch, block_tables=batch.block_tables.int()),
        replace(batch, block_size=0),
    ]
    for contradiction in contradictions:
        with raises(ValueError):
            replace(layer, batch=contradiction).run()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("isa")
def test_cached_attention_is_its_parts_in_one_call(dtype: torch.dtype) -> None:
    layers = Case(), Case(((1, 300), (1, 1), (40, 90)), 8, 2, 64, 32, window=17, has_sinks=True)
    with each_case() as tried:
        for case, has_norm, rotated in product(layers, (False, True), (0, 32, 64)):
            with tried(case, has_norm, rotated):
                check_cached_attention(case, dtype, dtype, has_norm=has_norm, rotated=rotated)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cache_type", extension.CACHE_TYPES)
@pytest.mark.usefixtures("isa")
def test_cached_attention_over_every_type_of_cache(cache_type: torch.dtype, dtype: torch.dtype) -> None:
    check_cached_attention(Case(value_dim=32), dtype, cache_type, has_norm=True, rotated=32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "options",
    [{"rounds_last": True}, {"is_interleaved": True}, {"softcap": 0.7}, {"norms_last": True}, {"chunk": 16}],
    ids=str,
)
@pytest.mark.usefixtures("isa")
def test_cached_attention_of_other_kinds(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_cached_attention(Case(), dtype, dtype, has_norm=True, rotated=32, **options)


def check_cached_attention(
    case: Case, dtype: torch.dtype, cache_type: torch.dtype, *, has_norm: bool, rotated: int, **options: Any
) -> None:
    layer = make(replace(case, query_type=dtype))
    tokens, heads, dim = layer.query.shape
    sizes = [heads * dim, case.kv_heads * dim, case.kv_heads * case.value_dim]
    generator = torch.Generator().manual_seed(1)
    projections = torch.randn(tokens, sum(sizes), generator=generator).to(dtype)
    angles = torch.randn(tokens, rotated // 2, generator=generator)
    places = [
        (table[position // case.block_size] * case.block_size + position % case.block_size)
        for table, (length, context) in zip(layer.batch.block_tables, case.sequences, strict=True)
        for position in range(context - length, context)
    ]

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        cache = LayerCache(layer.keys.to(cache_type), layer.values.to(cache_type))
        if cache_type in CODES:
            (keys, key_scales), (values, value_scales) = (
                reference.to_codes(rows, cache_type) for rows in (layer.keys, layer.values)
            )
            cache = LayerCache(keys, values, key_scales, value_scales)
        out = function(
            *projections.split(sizes, dim=1),
            CachedAttention(
                cache=cache,
                slot_ids=torch.stack(places),
                batch=layer.batch,
                scale=dim**-0.5,
                norms=(torch.linspace(0.5, 1.5, dim), torch.linspace(1.5, 0.5, dim)) if has_norm else None,
                norm_eps=1e-6,
                rotary=(angles.cos(), angles.sin()) if rotated else None,
                window=case.window,
                sinks=layer.sinks,
                **options,
            ),
        )
        return out, *(part.float().nan_to_num() for part in cache if part is not None)

    together = run(attention.cached_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "supports_cached_attention", lambda *_: False)
        in_parts = run(CpuOperators.cached_attention)
    for one, other in zip(together, in_parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cache_type", extension.CACHE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_kv_means_what_the_reference_says(
    dtype: torch.dtype, cache_type: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from rows of every size that there is."""
    use_isa(monkeypatch, "portable")
    generator = torch.Generator().manual_seed(0)
    for tokens in (0, 1, 5, 300):
        slot_ids = torch.randperm(512, generator=generator)[:tokens]
        sizes = 2.0 ** torch.randint(-140, 120, (tokens, 3, 1), generator=generator)
        new = [(torch.randn(tokens, 3, dim, generator=generator) * sizes).to(dtype) for dim in (24, 16)]
        if tokens == 300:
            new[0][7, 1] = 0.0
            new[0][8, 0, 3], new[0][9, 1, 4], new[1][10, 2, 5] = torch.inf, torch.nan, -torch.inf
        ours, expected = empty_cache(cache_type), empty_cache(cache_type)
        attention.write_kv(ours, new[0], new[1], slot_ids)
        reference.write_kv(expected, new[0], new[1], slot_ids)
        for one, other in zip(ours, expected, strict=True):
            if one is not None and other is not None:
                assert torch.equal(one.float().nan_to_num(2.5), other.float().nan_to_num(2.5))


def empty_cache(dtype: torch.dtype) -> LayerCache:
    scales = [torch.zeros(512, 3) for _ in range(2)] if dtype in CODES else (None, None)
    return LayerCache(torch.zeros(512, 3, 24, dtype=dtype), torch.zeros(512, 3, 16, dtype=dtype), *scales)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_as_near_as_their_type_allows(dtype: torch.dtype) -> None:
    rows = (
        torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 200)[:, None, None]
    )
    codes, scales = reference.to_codes(rows, dtype)
    found = codes.float() * scales[..., None]
    largest = rows.abs().amax(-1, keepdim=True)
    # int8: half a step of 1/127; fp8: half a unit of a 4-bit significand, or of the smallest exponent.
    allowed = largest / 254 if dtype is torch.int8 else (rows.abs() / 16).maximum(largest / 448 / 1024)
    assert ((found - rows).abs() <= allowed * 1.0001).all()
    assert torch.equal(found.abs().amax(-1, keepdim=True) > 0, largest > 0)
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), largest)


@pytest.mark.parametrize("dtype", CODES)
def test_a_value_that_is_not_finite_stays_visible(dtype: torch.dtype) -> None:
    """The sampler has to see it: no code could stand for it."""
    layer = make(Case(((1, 5),), 2, 2))
    for special in (torch.inf, torch.nan):
        cache = replace(layer, case=replace(layer.case, codes=dtype)).cache
        slot = int(layer.batch.block_tables[0, 0]) * 16
        key, value = layer.keys[slot : slot + 1].clone(), layer.values[slot : slot + 1].clone()
        value[0, 1, 3] = special
        for write, attend in (
            (reference.write_kv, reference.paged_attention),
            (CpuOperators.write_kv, CpuOperators.paged_attention),
        ):
            write(cache, key, value, torch.tensor([slot]))
            out = attend(layer.query, cache, layer.batch, scale=0.1)
            assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()


def test_write_kv_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_isa(monkeypatch, "portable")
    keys, values, new = torch.zeros(8, 2, 4), torch.zeros(8, 2, 4), torch.ones(2, 2, 4)
    for slot in (-1, 8):
        with raises(IndexError, slot):
            attention.write_kv(LayerCache(keys, values), new, new, torch.tensor([0, slot]))
    assert not keys.any()
    for named, arguments in (
        (("key", (1, 2, 4)), (new[:1], new)),
        (("value", (2, 2, 2)), (new, new[..., :2])),
        (("key", "float64"), (new.double(), new)),
        (("value", "int64"), (new, new.long())),
    ):
        with raises(ValueError, *named):
            attention.write_kv(LayerCache(keys, values), *arguments, torch.tensor([0, 1]))


def test_operators_take_the_compiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if not extension.is_available():
        pytest.skip(str(extension.why_unavailable()))
    layer = make(Case())
    result = layer.run(CpuOperators.paged_attention)
    assert torch.equal(result, layer.run())
    half = replace(layer, query=layer.query.half(), keys=layer.keys.half(), values=layer.values.half())
    assert not attention.supports_paged_attention(half.query, half.cache, half.batch)
    torch.testing.assert_close(half.run(CpuOperators.paged_attention).float(), result, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_sequences", [2, 40])
def test_tokens_that_are_not_split_between_threads_have_the_same_bits(num_sequences: int) -> None:
    """Alone a token's keys are cut into ranges, beside many others they are not."""
    generator = torch.Generator().manual_seed(num_sequences)
    length = 700
    slots = num_sequences * length
    keys = torch.randn(slots, 1, 144, generator=generator).bfloat16()
    cache = LayerCache(keys, keys[..., :128])
    query = torch.randn(num_sequences, 16, 144, generator=generator).bfloat16()
    tables = torch.arange(slots).view(num_sequences, length)
    lengths, threads = torch.full((num_sequences,), length), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = CpuOperators.paged_attention(
            query, cache, AttentionBatch(torch.arange(num_sequences + 1), lengths, tables, 1), scale=0.1
        )
        for index in range(num_sequences):
            one = slice(index, index + 1)
            batch = AttentionBatch(torch.arange(2), lengths[one], tables[one], 1)
            assert torch.equal(CpuOperators.paged_attention(query[one], cache, batch, scale=0.1), together[one])
    finally:
        torch.set_num_threads(threads)
