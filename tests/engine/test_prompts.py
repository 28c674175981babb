"""What is read from prompts: equal to the Hugging Face model's, however they are cut and whatever is preempted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from amalgam import LLM, SamplingParams
from amalgam.engine import prompts
from amalgam.engine.prompts import PromptEmbedding, PromptLogprobs
from amalgam.engine.request import FinishReason, RequestOutput
from amalgam.errors import RequestError
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.engine.fakes import VOCAB_SIZE, FakeDecoder, greedy_tokens, kv_cache_bytes
from tests.errors import raises
from tests.lazy import Lazy

AutoModelForCausalLM = Lazy("transformers", "AutoModelForCausalLM")

TEXTS = ["The captain looked at the sea for a long while, and then he said: " * 6, "def f(x):", "春风又绿江南岸"]
SCORE = SamplingParams(max_new_tokens=0, prompt_logprobs=2)


@pytest.fixture(scope="module", params=["one step", "chunks"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    settings = {"inference.dtype": "float32", "inference.max_seq_length": 256}
    if request.param == "chunks":
        settings["engine.max_step_tokens"] = 16
    with LLM(model=DEMO, settings=settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


class TestTransformers:
    def test_log_probabilities_of_prompts(self, llm: LLM, reference: torch.nn.Module, tokenizer: Tokenizer) -> None:
        for text, answer in zip(TEXTS, llm.generate(TEXTS, SCORE), strict=True):
            token_ids = tokenizer.encode(text)
            with torch.inference_mode():
                expected = reference(torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=1)
            assert (answer.finish_reason, answer.token_ids, answer.text) == (FinishReason.LENGTH, (), "")
            assert answer.prompt_logprobs[0] is None
            found = answer.prompt_logprobs[1:]
            assert [one.chosen for one in found] == pytest.approx(
                expected.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist(), abs=2e-4
            )
            values, ids = expected.topk(2)
            top = [value for one in found for _, value in one.top]
            assert top == pytest.approx(values.flatten().tolist(), abs=2e-4)
            is_clear = (values[:, 0] - values[:, 1] > 1e-3).tolist()
            firsts = zip(found, ids[:, 0].tolist(), is_clear, strict=True)
            assert all(one.top[0][0] == best for one, best, clear in firsts if clear)

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_embeddings(self, llm: LLM, reference: torch.nn.Module, tokenizer: Tokenizer, pooling: str) -> None:
        found = llm.embed(TEXTS, pooling)
        assert (found.shape, found.dtype) == ((3, 256), np.float32)
        for text, vector in zip(TEXTS, found, strict=True):
            with torch.inference_mode():
                hidden = reference.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
            expected = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
            np.testing.assert_allclose(vector, expected.numpy(), atol=1e-3, rtol=1e-3)

    def test_with_an_answer_behind_them(self, llm: LLM) -> None:
        params = SamplingParams(max_new_tokens=5, do_sample=False)
        [plain] = llm.generate(TEXTS[0], params)
        [scored] = llm.generate(TEXTS[0], SamplingParams(max_new_tokens=5, do_sample=False, prompt_logprobs=0))
        assert scored.token_ids == plain.token_ids
        [alone] = llm.generate(TEXTS[0], SamplingParams(max_new_tokens=0, prompt_logprobs=0))
        assert scored.prompt_logprobs == alone.prompt_logprobs


def expected_logits(token_ids):
    """Of the fake decoder, `[tokens, vocabulary]`; see `greedy_tokens`."""
    best = [greedy_tokens(token_ids[: end + 1], 1)[0] for end in range(len(token_ids))]
    return torch.stack([(7919 * (torch.arange(VOCAB_SIZE) - one) - 1) % VOCAB_SIZE for one in best]) * (8 / VOCAB_SIZE)


class TestScheduling:
    """By the same path as answers: chunks, other requests, preemptions, cancellations."""

    @pytest.mark.parametrize("cache", [{}, {"max_seq_length": 64, "kv_cache_bytes": kv_cache_bytes(20)}])
    def test_company_and_preemptions_change_nothing(self, make_engine, cache):
        generator = np.random.default_rng(0)
        prompt_ids = [generator.integers(1, VOCAB_SIZE, size).tolist() for size in generator.integers(1, 50, 24)]
        params = [SamplingParams(max_new_tokens=12, do_sample=False, ignore_eos=True, prompt_logprobs=3)] * 24
        engine = make_engine(max_step_tokens=7, **cache)
        for token_ids, answer in zip(prompt_ids, engine.generate(prompt_ids, params), strict=True):
            assert answer.token_ids == greedy_tokens(token_ids, 12)
            assert len(answer.prompt_logprobs) == len(token_ids)
            expected = expected_logits(token_ids).log_softmax(dim=1)
            for row, token_id, found in zip(expected, token_ids[1:], answer.prompt_logprobs[1:], strict=False):
                assert found.chosen == pytest.approx(float(row[token_id]), abs=1e-5)
                assert [token for token, _ in found.top] == row.topk(3).indices.tolist()

    def test_embeddings_wait_in_the_queue_with_answers(self, make_engine):
        engine = make_engine(max_step_tokens=7)
        before = engine.meter.read().num_prompt_tokens
        vectors = engine.embed_all([[1, 2, 3] * 9, [4]], "last")
        assert [vector.shape for vector in vectors] == [(2,), (2,)]
        assert engine.meter.read().num_prompt_tokens - before == 28
        assert engine.status().num_free_blocks == engine.status().num_blocks

    def test_a_caller_that_leaves_cancels_it(self, make_engine):
        decoder = FakeDecoder()
        decoder.gate.clear()
        engine = make_engine(decoder)

        async def leave():
            task = asyncio.create_task(engine.embed([1, 2, 3]))
            while not engine.status().num_running:  # noqa: ASYNC110 – the engine tells nobody
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        decoder.gate.set()
        assert engine.drain(10)
        assert engine.status().num_free_blocks == engine.status().num_blocks

    def test_what_is_not_finite_fails_its_request_only(self, make_engine):
        decoder = FakeDecoder()
        decoder.nan_token = 5
        bad, good = make_engine(decoder).generate([[1, 5, 2, 3], [1, 2, 3]], SCORE)
        assert bad.finish_reason is FinishReason.ERROR
        assert bad.error.code == "non_finite_logits"
        assert len(good.prompt_logprobs) == 3

    def test_an_empty_answer_needs_a_reason(self):
        with raises(RequestError, "max_new_tokens", 0):
            SamplingParams(max_new_tokens=0)


def test_logits_are_made_in_pieces(monkeypatch):
    """A piece is as large as it may be, whatever the chunk; what is found is the same."""
    hidden, vocab_size = torch.randn(100, 8), 50
    weight = torch.randn(vocab_size, 8)
    prompt_ids = torch.randint(vocab_size, (101,)).tolist()
    sizes = []

    def head(rows):
        sizes.append(len(rows))
        return rows @ weight.T

    whole = PromptLogprobs(prompt_ids, 2, vocab_size)
    whole.read(hidden, 0, head)
    monkeypatch.setattr(prompts, "PIECE_BYTES", 7 * 4 * vocab_size)
    cut = PromptLogprobs(prompt_ids, 2, vocab_size)
    for first, last in ((0, 30), (0, 30), (30, 64), (0, 100)):  # preempted twice
        cut.read(hidden[first:last], first, head)
    assert sizes[0] == 100
    assert max(sizes[1:]) == 7
    assert sum(sizes[1:]) == 100
    found, expected = (reader.added_to(RequestOutput(0, "", ())).prompt_logprobs[1:] for reader in (cut, whole))
    assert [one.chosen for one in found] == pytest.approx([one.chosen for one in expected], abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_does_not_depend_on_where_the_prompt_is_cut(pooling):
    hidden = torch.randn(64, 16)
    vectors = []
    for cuts in ([(0, 64)], [(0, 1), (1, 40), (0, 20), (20, 64)], [(n, n + 1) for n in range(64)]):
        reader = PromptEmbedding(60, pooling)
        for first, last in cuts:
            reader.read(hidden[first:last], first, lambda rows: rows)
        vectors.append(reader.added_to(RequestOutput(0, "", ())).embedding)
    assert all((vector == vectors[0]).all() for vector in vectors)
    expected = hidden[:60].mean(dim=0) if pooling == "mean" else hidden[59]
    np.testing.assert_allclose(vectors[0], expected, atol=1e-6)
