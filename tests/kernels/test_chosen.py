"""Attention over chosen positions: an indexer's scores, which of them are chosen, and where the cache has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amalgam.kernels import chosen
from amalgam.kernels.backends.cpu import attention, extension
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.chosen import Choice, chooses
from amalgam.kernels.step import AttentionBatch, LayerCache, StepContext, StepSequence
from amalgam.models.kv_cache import KVCache

BLOCK = 4


def step_of(*sequences: tuple[int, int]) -> StepContext:
    """Sequences of (tokens, first position), whose blocks alternate."""
    count = len(sequences)
    parts = [
        StepSequence([0] * tokens, first, range(index, index + count * -(-(first + tokens) // BLOCK), count), 0)
        for index, (tokens, first) in enumerate(sequences)
    ]
    slots = BLOCK * (1 + max(block for part in parts for block in part.block_ids))
    keys = torch.zeros(slots, 1, 8)
    return StepContext(parts, KVCache([LayerCache(keys, keys[..., :0])], BLOCK))


def slots_of(step: StepContext, sequence: int, positions: Tensor) -> list[int]:
    table = torch.tensor(list(step.sequences[sequence].block_ids))
    return (table[positions // BLOCK] * BLOCK + positions % BLOCK).tolist()


def test_of_equal_scores_the_first_are_chosen() -> None:
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[0, 1, 0, 0, -1, 0], [nan, 1, 3, inf, 2, -inf], [5, 5, 5, 5, 5, 5]]).float()
    assert reference.largest(scores, 3).tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]


def test_who_chooses_and_who_sees_all() -> None:
    assert not chooses(step_of((5, 0), (1, 4)), 5)
    step = step_of((7, 2), (1, 3), (2, 10), (4, 0))
    choice = Choice(step, 5)
    (part,) = choice.parts
    assert part.rows.tolist() == [3, 4, 5, 6, 8, 9]  # positions 5 to 8 of the first sequence, 10 and 11 of the third
    assert part.sequences.tolist() == [0, 0, 0, 0, 2, 2]
    assert part.batch.query_starts.tolist() == [0, 4, 6] and part.batch.context_lengths.tolist() == [9, 12]
    positions = torch.tensor([[0, 1, 2, 3, 5], [0, 2, 4, 5, 6], [3, 4, 5, 6, 7], [0, 1, 6, 7, 8]] * 2)[:6]
    batch = choice.attention(positions)
    assert batch.block_size == 1
    assert batch.query_starts.tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 10, 14]
    assert batch.context_lengths.tolist() == [5, 5, 5, 5, 5, 4, 5, 5, 4]
    tables = [row[:length].tolist() for row, length in zip(batch.block_tables, batch.context_lengths, strict=True)]
    rest = iter(positions)
    for table, sequence, length in zip(tables, (0, 0, 0, 0, 0, 1, 2, 2, 3), (5, 0, 0, 0, 0, 4, 0, 0, 4), strict=True):
        assert table == slots_of(step, sequence, torch.arange(length) if length else next(rest))


def test_long_prompts_choose_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "MOST_SCORES", 256 * 303)
    choice = Choice(step_of((300, 3), (200, 100)), 8)
    assert [len(part.rows) for part in choice.parts] == [256, 239]
    assert torch.cat([part.rows for part in choice.parts]).tolist() == list(range(5, 500))
    assert [part.batch.context_lengths.tolist() for part in choice.parts] == [[264], [303, 300]]


@pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))
@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [5, 64])
def test_scores(heads: int, dtype: torch.dtype, codes: torch.dtype | None) -> None:
    """Compiled and in torch, against plain products; what neighbours and later keys are changes no bit."""
    generator = torch.Generator().manual_seed(1)
    contexts, lengths, dim = torch.tensor([1500, 67, 3]), torch.tensor([2, 9, 1]), 40
    tables = torch.randperm(1200, generator=generator).view(3, 400)
    keys = torch.randn(4800, 1, dim, generator=generator).to(dtype)
    query = torch.randn(12, heads, dim, generator=generator).to(dtype)
    weights = torch.randn(12, heads, generator=generator)
    cache = LayerCache(keys, keys[..., :0])
    if codes is not None:
        found, scales = reference.to_codes(keys, codes)
        cache = LayerCache(found, found[..., :0], scales, scales[:, :0])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    batch = AttentionBatch(starts, contexts, tables, BLOCK)
    values = cache.keys[:, 0].float()
    if cache.key_scales is not None:
        values = values * cache.key_scales
    for score in (attention.index_scores, reference.index_scores):
        scores = score(query, weights, cache, batch)
        for sequence in range(3):
            table, context, length = tables[sequence], int(contexts[sequence]), int(lengths[sequence])
            places = torch.arange(context)
            seen = values[table[places // BLOCK] * BLOCK + places % BLOCK]
            rows = slice(int(starts[sequence]), int(starts[sequence]) + length)
            products = torch.einsum("thd,kd->thk", query[rows].float(), seen).relu()
            expected = torch.einsum("th,thk->tk", weights[rows], products)
            for index, row in enumerate(scores[rows]):
                own = context - length + index + 1
                torch.testing.assert_close(row[:own], expected[index, :own], rtol=1e-5, atol=1e-4 * heads)
                assert bool((row[own:] == -torch.inf).all())
        alone = AttentionBatch(torch.tensor([0, 1]), torch.tensor([1499]), tables[:1], BLOCK)
        assert torch.equal(score(query[:1], weights[:1], cache, alone)[0, :1499], scores[0, :1499])
