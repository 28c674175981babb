"""The expert statistics against the Hugging Face model, token by token, under load, cancellations and re-maps."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.composition import loader
from amalgam.config.settings import build_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason, Observation, RequestOutput
from amalgam.models.routing import RoutingTrace
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from tests.conftest import DEMO
from tests.lazy import Lazy

AutoModelForCausalLM = Lazy("transformers", "AutoModelForCausalLM")

NUM_REQUESTS = 100
MAX_TOKENS = 96
NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 16, 4
TEXTS = {
    "en": "The captain looked at the sea for a long while, and then he said that the ship would not come back before "
    "winter; nobody on the quay believed him, but nobody answered either.",
    "zh": "春风又绿江南岸，明月何时照我还。小楼一夜听风雨，深巷明朝卖杏花。",
    "py": "def count_words(text):\n    words = {}\n    for word in text.split():\n        words[word] = "
    "words.get(word, 0) + 1\n    return sorted(words.items())\n",
}


def perturbed_copy(folder: Path) -> Path:
    """The demo model with other routers: the same sizes, other choices."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Reference:
    """The Hugging Face model: which experts each token of a sequence goes to."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    @torch.inference_mode()
    def route(self, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Expert ids and gate weights, `[tokens, layers, k]`, the heaviest first; and whether a rounding decided,
        `[tokens, layers]`.
        """
        logits = self._model(torch.tensor([token_ids]), output_router_logits=True).router_logits
        weights, ids = torch.topk(torch.softmax(torch.stack(logits, dim=1).float(), dim=-1), TOP_K + 1, dim=-1)
        is_tie = (weights[..., TOP_K - 1] - weights[..., TOP_K]) < 1e-5 * weights[..., TOP_K]
        weights, ids = weights[..., :TOP_K], ids[..., :TOP_K]
        return ids.numpy(), (weights / weights.sum(-1, keepdim=True)).numpy(), is_tie.numpy()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed_copy(tmp_path_factory.mktemp("other") / "model")


@pytest.fixture(scope="module")
def references(other: Path) -> dict[str, Reference]:
    return {"base": Reference(DEMO), "other": Reference(other)}


@pytest.fixture
def deployment(other: Path) -> Iterator[Deployment]:
    settings = build_settings(
        {
            "model": {"base_path": str(DEMO), "mixed_precision": {"other_path": str(other)}},
            "inference": {"device_map": "cpu", "dtype": "float32", "max_seq_length": MAX_TOKENS, "max_batch_size": 16},
            # So small a cache preempts requests all the time.
            "engine": {"num_threads": 1, "max_step_tokens": 64, "kv_cache_bytes": 40 * 16 * 6 * 2 * 2 * 64 * 4},
            "statistics": {"pair_sampling": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        # The other routers are another model's, so that a re-map changes all choices.
        patch.setattr(loader, "check_agreement", lambda *_: None)
        deployment = open_deployment(settings)
        yield deployment
        deployment.close()


class Client:
    """One request: what it was told, and when it leaves."""

    def __init__(self, deployment: Deployment, prompt_ids: list[int], params: SamplingParams, leaves_after: int | None):
        self._engine = deployment.engine
        self._leaves_after = leaves_after
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.last: RequestOutput | None = None
        self.is_done = threading.Event()
        self._params = params
        self.request_id = 0

    def start(self, observation: Observation) -> None:
        self.request_id = self._engine.submit(self.token_ids[:], self._params, self._take, observation)

    def _take(self, output: RequestOutput) -> None:
        self.token_ids += output.token_ids
        if output.is_finished:
            self.last = output
            self.is_done.set()
        elif self._leaves_after is not None and len(self.token_ids) - self.num_prompt >= self._leaves_after:
            self._engine.cancel(self.request_id)

    @property
    def trace(self) -> RoutingTrace:
        assert self.last is not None and self.last.trace is not None
        return self.last.trace


def count(routing: np.ndarray, num_prompt: int) -> np.ndarray:
    """`[phases, layers, experts]` of one sequence."""
    counts = np.zeros((2, NUM_LAYERS, NUM_EXPERTS), np.int64)
    for position, by_layer in enumerate(routing):
        for layer, experts in enumerate(by_layer):
            counts[int(position >= num_prompt), layer, experts] += 1
    return counts


def test_counts_are_those_of_the_hugging_face_model(deployment: Deployment, references: dict[str, Reference]) -> None:
    """100 requests at once, a quarter of which leave early, while the routers are re-mapped to and fro."""
    rng = random.Random(7)
    sources = {1: "base"}
    clients, labels = [], []
    for index in range(NUM_REQUESTS):
        text = TEXTS[language := rng.choice(list(TEXTS))]
        start = rng.randrange(len(text) // 2)
        prompt_ids = deployment.tokenizer.encode(text[start : start + rng.randint(8, 80)])[:60]
        params = SamplingParams(max_new_tokens=rng.randint(1, 30), temperature=0.9, seed=index, ignore_eos=True)
        leaves_after = rng.choice([None, None, None, rng.randint(1, 12)])
        clients.append(Client(deployment, prompt_ids, params, leaves_after))
        labels.append(language)
    for client, label in zip(clients, labels, strict=True):
        client.start(Observation(label, wants_trace=True))
    for index, client in enumerate(clients):
        if index % 20 == 10:
            source = "other" if (index // 20) % 2 == 0 else "base"
            result = deployment.update_weight_mapping({"model.layers.*.mlp.gate.weight": source})
            sources[result.version] = source
        assert client.is_done.wait(120)

    expected = np.zeros((2, NUM_LAYERS, NUM_EXPERTS), np.int64)
    by_label = {label: np.zeros_like(expected) for label in TEXTS}
    num_tokens, num_ties = np.zeros(2, np.int64), 0
    for client, label in zip(clients, labels, strict=True):
        assert client.last is not None and client.last.usage is not None
        actual, version = client.trace.expert_ids, client.last.usage.version
        if client.last.finish_reason is FinishReason.LENGTH:
            assert len(actual) == len(client.token_ids) - 1  # the last token was never fed back
        if not len(actual):
            continue  # left before its first step
        ids, weights, is_tie = references[sources[version]].route(client.token_ids[: len(actual)])
        differs = (np.sort(actual) != np.sort(ids)).any(axis=-1)
        assert not (differs & ~is_tie).any()
        num_ties += differs.sum()
        ids[differs] = actual[differs]
        np.testing.assert_allclose(np.sort(client.trace.gate_weights), np.sort(weights), atol=1e-4)
        counts = count(ids, client.num_prompt)
        expected += counts
        by_label[label] += counts
        num_tokens += [min(len(ids), client.num_prompt), max(len(ids) - client.num_prompt, 0)]

    assert num_ties <= 2  # of some twenty thousand decisions, on a machine that rounds otherwise
    assert deployment.statistics is not None
    tracker = deployment.statistics.tracker
    snapshot = tracker.snapshot()
    np.testing.assert_array_equal(snapshot.tally.counts, expected)
    np.testing.assert_array_equal(snapshot.tally.num_tokens, num_tokens)
    assert snapshot.tally.counts.sum() == num_tokens.sum() * TOP_K * NUM_LAYERS
    np.testing.assert_array_equal(tracker.snapshot(minutes=60).tally.counts, expected)
    for label, tally in tracker.label_tallies().items():
        np.testing.assert_array_equal(tally.counts, by_label[label])
    assert len({client.last.usage.version for client in clients if client.last and client.last.usage}) > 2
    reasons = [client.last.finish_reason for client in clients if client.last]
    assert 10 < reasons.count(FinishReason.CANCELLED) < 50
    for row, layer_id in enumerate(tracker.layer_ids):
        pairs = tracker.layer_pairs(layer_id)
        assert pairs.num_tokens == num_tokens.sum()
        np.testing.assert_array_equal(np.diagonal(pairs.together), expected.sum(axis=0)[row])


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_is_traced_as_the_hugging_face_model_routes_it(
    deployment: Deployment, references: dict[str, Reference], language: str
) -> None:
    token_ids = deployment.tokenizer.encode(TEXTS[language])[:90]
    [answer] = deployment.engine.generate(
        [token_ids], SamplingParams(max_new_tokens=1), Observation(wants_trace=True, is_counted=False)
    )
    assert answer.trace is not None
    ids, weights, _ = references["base"].route(token_ids)
    np.testing.assert_array_equal(answer.trace.expert_ids, ids)
    np.testing.assert_allclose(answer.trace.gate_weights, weights, atol=1e-5)
    assert deployment.statistics is not None
    tracker = deployment.statistics.tracker
    summary = tracker.snapshot().tally
    assert summary.num_tokens.sum() == summary.num_requests == 0
