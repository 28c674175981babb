"""The same engine without a server: `from amalgam import LLM, SamplingParams`.

In: a configuration, prompts. Out: answers. Must never know: how a deployment is made.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from amalgam.composition.progress import Progress
from amalgam.config.names import CURRENT
from amalgam.config.placement import PlacementLike, Rule, build_rules
from amalgam.config.reading import load_settings
from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Generation, Observation, Pooling, RequestOutput
from amalgam.errors import ConfigError, RequestError
from amalgam.experts.saved.files import save
from amalgam.models.weights import WeightVersion
from amalgam.runtime.changes import ChangeRequest, RemapResult
from amalgam.runtime.chats import ChatAnswer, Chats, Messages, Tools
from amalgam.runtime.jobs import Job, JobStatus
from amalgam.runtime.opening import open_deployment
from amalgam.runtime.preview import ChangePlan, Difference
from amalgam.runtime.statistics import ExpertStatistics
from amalgam.runtime.versions import LiveVersion
from amalgam.text.grammar import CompiledGrammar, Grammar, compile_grammar

_NONE: Mapping[str, Any] = MappingProxyType({})


class LLM:
    """A model in this process. Any thread may use it, and any number of them; the methods with an `a` are awaited.

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
        self._chats = Chats(self._deployment)

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        domain: str | None = None,
        routed_experts: bool = False,
        weights: str | int | None = None,
    ) -> list[Generation]:
        """Answer all prompts together; results in their order.

        Args:
            params: what they leave out, or None, is as the model's `generation_config.json` has it.
            grammar: what each answer must follow: `Grammar.of_schema({...})`, `Grammar("regex", "[0-9]+")`.
            domain: a label under which the expert statistics count these prompts apart.
            routed_experts: each result's `trace` tells the experts of every token.
            weights: a version to run on, by name or id; None: the current one.

        Raises:
            VersionNotFoundError: there are no such weights.
        """
        return self._deployment.engine.generate(
            self._encode(prompts),
            self._over_defaults(params),
            Observation(domain, routed_experts),
            constraint=self._compile(grammar),
            version=self._version(weights),
        )

    async def agenerate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        domain: str | None = None,
        routed_experts: bool = False,
        weights: str | int | None = None,
    ) -> list[Generation]:
        """`generate`, awaited; several calls are answered together. Cancelling one cancels its requests."""
        return await self._deployment.engine.generate_async(
            await asyncio.to_thread(self._encode, prompts),
            self._over_defaults(params),
            Observation(domain, routed_experts),
            await asyncio.to_thread(self._compile, grammar),
            self._version(weights),
        )

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        grammar: Grammar | None = None,
        template_variables: Mapping[str, Any] = _NONE,
        domain: str | None = None,
        routed_experts: bool = False,
        weights: str | int | None = None,
    ) -> list[ChatAnswer]:
        """Answer a conversation, `[{"role": "user", "content": "…"}]`, or several of them together.

        Args:
            params: as those of `generate`.
            tools: functions that the model may call, `{"type": "function", "function": {…}}`.
            grammar: what each answer's content must follow; not together with tools.
            template_variables: what else the chat template may refer to, such as `enable_thinking`.
            weights: a version to run on, by name or id; None: the current one.

        Raises:
            VersionNotFoundError: there are no such weights.
            RequestError: the model has no chat template, or it refuses the messages.
        """
        prompts_ids, constraint = self._encode_chats(conversations, tools, grammar, template_variables)
        sampling, observation = self._chats.params(self._over_defaults(params)), Observation(domain, routed_experts)
        version = self._version(weights)
        answers = self._deployment.engine.generate(
            prompts_ids, sampling, observation, constraint=constraint, version=version
        )
        return self._taken_apart(prompts_ids, tools, answers)

    async def achat(
        self,
        conversations: Messages | Sequence[Messages],
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        grammar: Grammar | None = None,
        template_variables: Mapping[str, Any] = _NONE,
        domain: str | None = None,
        routed_experts: bool = False,
        weights: str | int | None = None,
    ) -> list[ChatAnswer]:
        """`chat`, awaited; several calls are answered together. Cancelling one cancels its requests."""
        prompts_ids, constraint = await asyncio.to_thread(
            self._encode_chats, conversations, tools, grammar, template_variables
        )
        sampling, observation = self._chats.params(self._over_defaults(params)), Observation(domain, routed_experts)
        version = self._version(weights)
        answers = await self._deployment.engine.generate_async(prompts_ids, sampling, observation, constraint, version)
        return self._taken_apart(prompts_ids, tools, answers)

    def _encode_chats(
        self,
        conversations: Messages | Sequence[Messages],
        tools: Tools | None,
        grammar: Grammar | None,
        variables: Mapping[str, Any],
    ) -> tuple[list[list[int]], CompiledGrammar | None]:
        if tools and grammar is not None:
            raise RequestError("grammar is given with tools.", remedy="Give one of them: a call would not follow it.")
        if not conversations:
            raise RequestError("There is no message.", remedy="Give at least one.")
        is_one = isinstance(conversations[0], Mapping)
        several = cast("Sequence[Messages]", [conversations] if is_one else conversations)
        prompts_ids = [self._chats.encode(messages, tools, variables) for messages in several]
        # All of them end alike: in what the template begins an answer with.
        return prompts_ids, self._compile(None if grammar is None else self._chats.grammar(grammar, prompts_ids[0]))

    def _taken_apart(
        self, prompts_ids: Sequence[Sequence[int]], tools: Tools | None, answers: Sequence[Generation]
    ) -> list[ChatAnswer]:
        return [
            self._chats.answer(prompt_ids, tools, answer)
            for prompt_ids, answer in zip(prompts_ids, answers, strict=True)
        ]

    def embed(
        self, prompts: str | Sequence[str], pooling: Pooling = "mean", *, domain: str | None = None
    ) -> npt.NDArray[np.float32]:
        """One vector for each prompt, `[prompts, hidden]`: the mean of its tokens' hidden states, or the last one's.

        They are what the final norm gives, and not scaled to a length.
        """
        prompts_ids = self._encode(prompts, num_new_tokens=0)
        return np.stack(self._deployment.engine.embed_all(prompts_ids, pooling, Observation(domain)))

    async def aembed(
        self, prompts: str | Sequence[str], pooling: Pooling = "mean", *, domain: str | None = None
    ) -> npt.NDArray[np.float32]:
        """`embed`, awaited; computed together with whatever else waits. Cancelling it cancels its requests."""
        prompts_ids = await asyncio.to_thread(self._encode, prompts, num_new_tokens=0)
        return np.stack(await self._deployment.engine.embed_all_async(prompts_ids, pooling, Observation(domain)))

    def _encode(self, prompts: str | Sequence[str], num_new_tokens: int = 1) -> list[list[int]]:
        texts = [prompts] if isinstance(prompts, str) else prompts
        max_tokens = self._deployment.engine.max_prompt_tokens + 1 - num_new_tokens
        return [self._deployment.tokenizer.encode(text, max_tokens) for text in texts]

    def _compile(self, grammar: Grammar | None) -> CompiledGrammar | None:
        return None if grammar is None else compile_grammar(self._deployment.tokenizer, grammar)

    def stream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        weights: str | int | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer one prompt piece by piece; leaving the iterator early cancels the request.

        Raises:
            AmalgamError: the request cannot be served, or failed on its way.
        """
        outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        engine = self._deployment.engine
        token_ids = self._deployment.tokenizer.encode(prompt, engine.max_prompt_tokens)
        request_id = engine.submit(
            token_ids,
            self._over_defaults(params),
            outputs.put,
            constraint=self._compile(grammar),
            version=self._version(weights),
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

    async def astream(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        weights: str | int | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """`stream`, awaited. To leave it early and cancel the request, close it: `contextlib.aclosing`.

        Raises:
            AmalgamError: the request cannot be served, or failed on its way.
        """
        engine, encode = self._deployment.engine, self._deployment.tokenizer.encode
        token_ids = await asyncio.to_thread(encode, prompt, engine.max_prompt_tokens)
        constraint = await asyncio.to_thread(self._compile, grammar)
        version = self._version(weights)
        outputs = engine.stream(token_ids, self._over_defaults(params), constraint=constraint, version=version)
        async with aclosing(outputs):
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                yield output

    @property
    def engine(self) -> Engine:
        """What computes the answers: `status()` and `meter` tell how busy it is."""
        return self._deployment.engine

    @property
    def default_params(self) -> SamplingParams:
        """What a request gets where it says nothing: the model's `generation_config.json`, and ours for the rest."""
        return self._deployment.defaults.params

    def _over_defaults(self, params: SamplingParams | None) -> SamplingParams:
        return (params or SamplingParams()).over(self.default_params)

    def _version(self, weights: str | int | None) -> WeightVersion | None:
        return None if weights is None else self._deployment.version_for(weights)

    def update_weight_mapping(
        self, mapping: Mapping[str, PlacementLike | None], *, name: str | None = None, progress: Progress | None = None
    ) -> RemapResult:
        """Change where weights come from; requests in flight finish on what they started with.

        Args:
            mapping: name or pattern → source, or {"source": …, "device": …}, added to the rules in use; None removes
                a rule.
            name: of a version beside the current one, which requests get with `weights=name`; None: all get it.
            progress: called while weights are read; what it raises ends the change, and nothing has changed.
        """
        return self._deployment.change(ChangeRequest(mapping=mapping, name=name), progress)

    def set_weight_mapping(
        self, mapping: Mapping[str, PlacementLike], *, name: str | None = None, progress: Progress | None = None
    ) -> RemapResult:
        """The same with the whole set of rules, in place of those in use; `{}`: all from the default source."""
        return self._deployment.change(ChangeRequest(rules=build_rules(mapping), name=name), progress)

    def reload_weights(self, *, name: str | None = None, progress: Progress | None = None) -> RemapResult:
        """Take the files as they are now."""
        return self._deployment.change(ChangeRequest(is_reload=True, name=name), progress)

    def name_weights(self, name: str, version: str | int = CURRENT) -> RemapResult:
        """Give a version a name that requests can ask for; one that another version had passes to it.

        Args:
            version: itself if it is in memory, otherwise what its rules give now.

        Raises:
            VersionNotFoundError: nobody knows the version.
        """
        return self._deployment.change(ChangeRequest(version=version, name=name))

    def plan_update(
        self,
        mapping: Mapping[str, PlacementLike | None] | None = None,
        *,
        rules: Mapping[str, PlacementLike] | Iterable[Rule] | None = None,
        reload: bool = False,
        version: str | int | None = None,
        name: str | None = None,
    ) -> ChangePlan:
        """What a change would change, read and take; nothing changes. One of the first four says which.

        Args:
            mapping: as of `update_weight_mapping`.
            rules: as of `set_weight_mapping`, or as a version has them.
            reload: as `reload_weights`.
            version: as of `rollback`, by name or id.
            name: that the version would get, beside the current one.

        Raises:
            RequestError: not exactly one of the four is given.
            VersionNotFoundError: nobody knows the version.
            PlanError, CheckpointError: the change could not be made.
        """
        return self._deployment.plan_change(_asked(mapping, rules, version, name, is_reload=reload))

    def start_update(
        self,
        mapping: Mapping[str, PlacementLike | None] | None = None,
        *,
        rules: Mapping[str, PlacementLike] | Iterable[Rule] | None = None,
        reload: bool = False,
        version: str | int | None = None,
        name: str | None = None,
    ) -> Job:
        """A change in the background, asked for as of `plan_update`: `status()` of what it returns tells how far it is,
        `cancel()` ends it, `wait()` gives its result.

        Raises:
            RequestError: not exactly one change is asked for.
            ConflictError: another change is under way.
        """
        return self._deployment.start_change(_asked(mapping, rules, version, name, is_reload=reload))

    def start_rollback(self) -> Job:
        """`rollback` to the version before, in the background; to another one: `start_update(version=…)`.

        Raises:
            ConflictError: another change is under way.
        """
        return self._deployment.start_rollback()

    def rollback(self, version: str | int | None = None) -> RemapResult:
        """Go back to an earlier version, by name or id; None: the one before the current one.

        Raises:
            ConflictError: there is none before.
            VersionNotFoundError: nobody knows the version.
        """
        return self._deployment.rollback(version)

    def remove_weights(self, name: str) -> None:
        """Take a name away; the memory of its version goes back unless something else keeps it.

        Raises:
            VersionNotFoundError: there is no such name.
        """
        self._deployment.versions.remove_name(name)

    def pin(self, version_id: int) -> None:
        """Keep a version in memory until `unpin`.

        Raises:
            VersionNotFoundError: it is not in memory.
        """
        self._deployment.versions.pin(version_id)

    def unpin(self, version_id: int) -> None:
        """
        Raises:
            VersionNotFoundError: it is not pinned.
        """
        self._deployment.versions.unpin(version_id)

    def difference(self, before: str | int, after: str | int = "current") -> Difference:
        """The weights in which two versions differ, by names or ids; of one that has left memory, what its rules give.

        Raises:
            VersionNotFoundError: nobody knows one of them.
        """
        return self._deployment.difference(before, after)

    @property
    def versions(self) -> list[LiveVersion]:
        """The weight versions in memory, the current one first: why each is kept, and the requests on it."""
        return self._deployment.versions.live()

    @property
    def changes(self) -> list[JobStatus]:
        """The changes of the weights so far, oldest first; refused ones too."""
        return self._deployment.jobs.read()

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


def _asked(
    mapping: Mapping[str, PlacementLike | None] | None,
    rules: Mapping[str, PlacementLike] | Iterable[Rule] | None,
    version: str | int | None,
    name: str | None,
    *,
    is_reload: bool,
) -> ChangeRequest:
    """
    Raises:
        RequestError: not exactly one change is asked for.
    """
    whole = build_rules(rules) if isinstance(rules, Mapping) else None if rules is None else tuple(rules)
    return ChangeRequest(mapping, whole, is_reload, version, name)
