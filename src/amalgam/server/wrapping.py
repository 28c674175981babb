"""A deployment, and an engine, that forward everything to another one: whoever changes some of it overrides that.

In: what the server asks (`interface`). Out: the same, of what is wrapped. Must never know: what any of it does.

Each member stands here by its name, so that the type checker finds one that the interface has got and this has not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from amalgam.config.placement import PlacementLike, Rule
from amalgam.config.settings import Settings
from amalgam.engine.meter import Meter
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import EngineStatus, Observation, RequestOutput
from amalgam.runtime.changes import ChangeRequest, RemapRecord, RemapResult
from amalgam.runtime.jobs import Job, Jobs
from amalgam.server.interface import (
    JSON,
    Autoplan,
    Deployment,
    Engine,
    OutputStream,
    Statistics,
    Tokenizer,
    Trials,
    Versions,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from amalgam.engine.generation_config import ModelDefaults
    from amalgam.models.weights import WeightVersion
    from amalgam.runtime.devices import DeviceFigures
    from amalgam.runtime.preview import ChangePlan, Difference
    from amalgam.text.grammar import CompiledGrammar


class WrappedEngine:
    """`amalgam.server.interface.Engine`, by another one."""

    def __init__(self, engine: Engine) -> None:
        self.wrapped = engine

    @property
    def meter(self) -> Meter:
        return self.wrapped.meter

    @property
    def max_prompt_tokens(self) -> int:
        return self.wrapped.max_prompt_tokens

    def status(self) -> EngineStatus:
        return self.wrapped.status()

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        self.wrapped.check_prompt_length(num_tokens, num_new_tokens)

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int = 1) -> Sequence[int]:
        return self.wrapped.checked_prompt(prompt_ids, num_new_tokens)

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> OutputStream:
        return self.wrapped.stream(prompt_ids, params, observation, constraint, version)

    def between_steps(self) -> AbstractContextManager[None]:
        return self.wrapped.between_steps()

    def embed(
        self,
        prompt_ids: Sequence[int],
        pooling: Literal["mean", "last"],
        observation: Observation,
        version: WeightVersion | None = None,
        on_output: Callable[[RequestOutput], None] = lambda output: None,
    ) -> Awaitable[npt.NDArray[np.float32]]:
        return self.wrapped.embed(prompt_ids, pooling, observation, version, on_output)

    def stop(self) -> None:
        self.wrapped.stop()


class WrappedDeployment:
    """`amalgam.server.interface.Deployment`, by another one."""

    def __init__(self, deployment: Deployment) -> None:
        self.wrapped = deployment

    @property
    def settings(self) -> Settings:
        return self.wrapped.settings

    @property
    def model_name(self) -> str:
        return self.wrapped.model_name

    @property
    def defaults(self) -> ModelDefaults:
        return self.wrapped.defaults

    @property
    def engine(self) -> Engine:
        return self.wrapped.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.wrapped.tokenizer

    @property
    def statistics(self) -> Statistics | None:
        return self.wrapped.statistics

    @property
    def autoplan(self) -> Autoplan | None:
        return self.wrapped.autoplan

    @property
    def version_id(self) -> int:
        return self.wrapped.version_id

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.wrapped.rules

    def version_for(self, weights: str | int | None = None, key: str | None = None) -> WeightVersion:
        return self.wrapped.version_for(weights, key)

    @property
    def trials(self) -> Trials:
        return self.wrapped.trials

    @property
    def configured_rules(self) -> tuple[Rule, ...]:
        return self.wrapped.configured_rules

    @property
    def num_undoable(self) -> int:
        return self.wrapped.num_undoable

    @property
    def jobs(self) -> Jobs:
        return self.wrapped.jobs

    @property
    def remaps(self) -> list[RemapRecord]:
        return self.wrapped.remaps

    def model_info(self) -> JSON:
        return self.wrapped.model_info()

    def device_figures(self) -> Mapping[str, DeviceFigures]:
        return self.wrapped.device_figures()

    def expert_info(self, layer_id: int, expert_id: int) -> JSON:
        return self.wrapped.expert_info(layer_id, expert_id)

    def manifest(self, *, sha256: bool = False) -> JSON:
        return self.wrapped.manifest(sha256=sha256)

    @property
    def versions(self) -> Versions:
        return self.wrapped.versions

    def describe_weights(self) -> JSON:
        return self.wrapped.describe_weights()

    def describe_version(self, weights: str | int) -> JSON:
        return self.wrapped.describe_version(weights)

    def difference(self, before: str | int, after: str | int) -> Difference:
        return self.wrapped.difference(before, after)

    def plan_change(self, request: ChangeRequest) -> ChangePlan:
        return self.wrapped.plan_change(request)

    def change(self, request: ChangeRequest) -> RemapResult:
        return self.wrapped.change(request)

    def rollback(self, version: str | int | None = None) -> RemapResult:
        return self.wrapped.rollback(version)

    def update_weight_mapping(self, mapping: Mapping[str, PlacementLike | None]) -> RemapResult:
        return self.wrapped.update_weight_mapping(mapping)

    def undo_weight_mapping(self, version_id: int) -> RemapResult:
        return self.wrapped.undo_weight_mapping(version_id)

    def reload_weights(self) -> RemapResult:
        return self.wrapped.reload_weights()

    def start_change(self, request: ChangeRequest) -> Job:
        return self.wrapped.start_change(request)

    def start_rollback(self) -> Job:
        return self.wrapped.start_rollback()

    def close(self) -> None:
        self.wrapped.close()
