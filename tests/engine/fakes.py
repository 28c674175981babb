"""A decoder whose every token depends on all keys and values that it reads through the block tables."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch

from amalgam.config.settings import build_settings

VOCAB_SIZE = 8192
MAX_POSITIONS = 1000
_STRIDE = 7919  # odd, so that multiples of it reach every token


class FakeVersion:
    def __init__(self, version_id):
        self.version_id = version_id

    def check_mapped(self):
        """None of its weights are mapped; asked for where a mapped file has been lost anywhere in the process."""


class FakeDecoder:
    """Adds up `(token + 1) × (17 × place + 3)` over the sequence, from a cache that holds token and place.

    Attributes:
        gate: steps wait for it.
        on_step: called with the step's token ids before it is computed.
        nan_token: its row's logits are NaN.
    """

    def __init__(self):
        self.spec = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            max_positions=MAX_POSITIONS,
            kv_shapes=((1, 1, 1), (2, 3, 1)),
            state_shapes=(None, None),
            index_dims=(0, 0),
            state_bytes=0,
            num_experts=8,
        )
        self.gate = threading.Event()
        self.gate.set()
        self.on_step = lambda token_ids: None
        self.nan_token = None

    def prepare(self, weights, kv):
        self.compile(weights)

    def compile(self, weights):
        return SimpleNamespace(describe=dict, hidden=lambda: self.hidden, head=self.head)

    def forward(self, context, weights):
        token_ids = context.token_ids
        assert self.gate.wait(60)
        self.on_step(token_ids.tolist())
        for layer_id, (keys, values, *_) in enumerate(context.kv.layers):
            keys[context.slot_ids] = token_ids[:, None, None].to(keys.dtype) + layer_id
            values[context.slot_ids] = context.positions[:, None, None].to(values.dtype)
        hashes = torch.cat([self._hash_rows(context, i) for i in range(len(context.attention.context_lengths))])
        if context.observer is not None:
            expert_ids = torch.stack((token_ids % 8, (token_ids + 1) % 8), dim=1)
            context.observer.observe(0, expert_ids, torch.full(expert_ids.shape, 0.5))
        hashes = hashes + 1009 * weights.version_id
        is_nan = token_ids == (-1 if self.nan_token is None else self.nan_token)
        self.hidden = torch.stack((hashes.double(), is_nan.double()), dim=1)
        return self.head(self.hidden[context.logit_rows])

    def head(self, hidden):
        hashes, is_nan = hidden[:, :1].long(), hidden[:, 1:].bool()
        logits = (_STRIDE * torch.arange(VOCAB_SIZE) + 31 * hashes) % VOCAB_SIZE * (8 / VOCAB_SIZE)
        return logits.float().masked_fill(is_nan, torch.nan)

    def _hash_rows(self, context, sequence):
        attention = context.attention
        num_rows = int(attention.query_starts[sequence + 1] - attention.query_starts[sequence])
        length = int(attention.context_lengths[sequence])
        offsets = torch.arange(attention.block_size)
        slots = (attention.block_tables[sequence][:, None] * attention.block_size + offsets).reshape(-1)[:length]
        terms = torch.zeros(length, dtype=torch.int64)
        for layer_id, (keys, values, *_) in enumerate(context.kv.layers):
            tokens, places = keys[slots, -1, -1].long() - layer_id, values[slots, -1, -1].long()
            terms += (tokens + 1) * (17 * places + 3)
        return terms.cumsum(0)[length - num_rows :] // 2


class FunctionProposer:
    """Guesses what a function of a request's tokens says."""

    is_free = True
    num_computed = 0

    def __init__(self, propose):
        self._propose = propose

    def propose(self, wanted):
        return {request.request_id: self._propose(tuple(request.token_ids)) for request, _ in wanted}

    def num_missing(self, request):
        return 0

    def forget(self, request_id):
        pass


def greedy_tokens(prompt_ids, num_new, version_id=1):
    """What the fake decoder answers, computed without it."""
    token_ids = list(prompt_ids)
    for _ in range(num_new):
        total = sum((token + 1) * (17 * place + 3) for place, token in enumerate(token_ids)) + 1009 * version_id
        token_ids.append((VOCAB_SIZE - 1 - 31 * total) * pow(_STRIDE, -1, VOCAB_SIZE) % VOCAB_SIZE)
    return tuple(token_ids[len(prompt_ids) :])


def make_settings(*, max_seq_length=256, max_batch_size=8, **engine):
    return build_settings(
        {
            "model": {"base_path": "unused"},
            "inference": {"max_seq_length": max_seq_length, "max_batch_size": max_batch_size, "dtype": "float32"},
            "engine": {"block_size": 4, "max_step_tokens": 32, "rollback_answers": 0, **engine},
        }
    )


def kv_cache_bytes(num_blocks, block_size=4):
    """Setting for a cache of exactly so many blocks."""
    return num_blocks * block_size * (1 + 1 + 6 + 2) * 4
