"""The same engine without a server: `from amalgam import LLM, SamplingParams`.

In: a configuration, prompts. Out: answers. Must never know: how a deployment is made.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.composition.progress import Progress
from amalgam.config.settings import load_settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Generation, Observation, Pooling, RequestOutput
from amalgam.errors import ConfigError
from amalgam.experts.saved.files import save
from amalgam.runtime.changes import RemapResult
from amalgam.runtime.opening import open_deployment
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.text.grammar import CompiledGrammar, Grammar, compile_grammar


class LLM:
    """A model in this process.

    Args:
        config: a YAML file as `amalgam serve --config` takes it; or
        model: a checkpoint folder or hub id, served as it is.
        settings: dotted settings on top, `{"inference.dtype": "float32"}`.

    Raises:
        AmalgamError: whatever is wrong with settings, checkpoints or plan.
    """

    def __init__(
        self,
        config: str | Path | None = None,
        model: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if (config is None) == (model is None):
            raise ConfigError("Give either config or model.", remedy='For instance LLM(model="models/demo").')
        overrides = dict(settings or {})
        if model is not None:
            overrides["model.base_path"] = str(model)
        self._deployment = open_deployment(load_settings(config, overrides), progress)

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        domain: str | None = None,
        routed_experts: bool = False,
    ) -> list[Generation]:
        """Answer all prompts together; results in their order.

        Args:
            params: what they leave out, or None, is as the model's `generation_config.json` has it.
            grammar: what each answer must follow: `Grammar.of_schema({...})`, `Grammar("regex", "[0-9]+")`.
            domain: a label under which the expert statistics count these prompts apart.
            routed_experts: each result's `trace` tells the experts of every token.
        """
        return self._deployment.engine.generate(
            self._encode(prompts),
            self._over_defaults(params),
            Observation(domain, routed_experts),
            constraint=self._compile(grammar),
        )

    def embed(
        self, prompts: str | Sequence[str], pooling: Pooling = "mean", *, domain: str | None = None
    ) -> npt.NDArray[np.float32]:
        """One vector for each prompt, `[prompts, hidden]`: the mean of its tokens' hidden states, or the last one's.

        They are what the final norm gives, and not scaled to a length.
        """
        return np.stack(self._deployment.engine.embed_all(self._encode(prompts), pooling, Observation(domain)))

    def _encode(self, prompts: str | Sequence[str]) -> list[list[int]]:
        texts = [prompts] if isinstance(prompts, str) else prompts
        return [self._deployment.tokenizer.encode(text, self._deployment.engine.max_prompt_tokens) for text in texts]

    def _compile(self, grammar: Grammar | None) -> CompiledGrammar | None:
        return None if grammar is None else compile_grammar(self._deployment.tokenizer, grammar)

    def stream(
        self, prompt: str, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one prompt piece by piece; leaving the iterator early cancels the request.

        Raises:
            AmalgamError: the request cannot be served, or failed on its way.
        """
        outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        engine = self._deployment.engine
        token_ids = self._deployment.tokenizer.encode(prompt, engine.max_prompt_tokens)
        request_id = engine.submit(
            token_ids, self._over_defaults(params), outputs.put, constraint=self._compile(grammar)
        )
        try:
            while True:
                output = outputs.get()
                if output.error is not None:
                    raise output.error
                yield output
                if output.is_finished:
                    return
        finally:
            engine.cancel(request_id)

    @property
    def default_params(self) -> SamplingParams:
        """What a request gets where it says nothing: the model's `generation_config.json`, and ours for the rest."""
        return self._deployment.defaults.params

    def _over_defaults(self, params: SamplingParams | None) -> SamplingParams:
        return (params or SamplingParams()).over(self.default_params)

    def update_weight_mapping(self, mapping: Mapping[str, str]) -> RemapResult:
        """Change where weights come from; requests in flight finish on what they started with."""
        return self._deployment.update_weight_mapping(mapping)

    def reload_weights(self) -> RemapResult:
        """Take the files as they are now."""
        return self._deployment.reload_weights()

    def expert_stats(self, top_k: int | None = None, minutes: float | None = None) -> dict[str, Any]:
        """Which experts the traffic has activated; the answer of `GET /expert_stats`.

        Raises:
            ConfigError: the model has no experts, or statistics are switched off.
        """
        return self._statistics().overview(minutes, top_k)

    def save_expert_stats(self, path: str | Path) -> None:
        """Write a saved set, to compare, to merge, or as `statistics.reference`: safetensors, or .npz if named so.

        Raises:
            ConfigError: the model has no experts, or statistics are switched off.
        """
        save(self._statistics().saved_set(), Path(path))

    def model_info(self) -> dict[str, Any]:
        """Architecture, sizes, sources, precisions and memory; the answer of `GET /model_info`."""
        return self._deployment.model_info()

    def _statistics(self) -> ExpertStatistics:
        if self._deployment.statistics is None:
            raise ConfigError("This model's experts are not counted: it has none, or statistics.enabled is false.")
        return self._deployment.statistics

    def close(self) -> None:
        """Stop the engine and free the weights."""
        self._deployment.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
