"""Plans that follow the traffic: looks at it now and then, and gives the deployment other weights where that pays.

In: a deployment, its statistics, sensitivities, tokens of some requests. Out: changes of the weights, and what is told
of them. Must never know: HTTP. What is decided, and why, is in `planning.following`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy.typing as npt
import torch

from amalgam.base.machine import detect_machine
from amalgam.base.threads import EXIT_SECONDS, StoppableThread
from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.config.environment import state_folder
from amalgam.config.placement import BASE_SOURCE, Rule, build_rules, placing
from amalgam.config.planning import AutoplanSettings
from amalgam.config.settings import Settings
from amalgam.engine.core import Engine
from amalgam.engine.request import Request, RequestOutput
from amalgam.engine.speculation.draft import DraftProposer
from amalgam.errors import AmalgamError, ConfigError, ConflictError, RequestError, UnavailableError
from amalgam.evaluation.confidence import MIN_UNITS
from amalgam.experts.tracker import ExpertTracker
from amalgam.kernels.quiet import be_quiet
from amalgam.models.weights import WeightVersion
from amalgam.planning import following
from amalgam.planning.budget import Budget, parse_budget
from amalgam.planning.following import Candidate, Decision, Limits, Proposer, Shadowed, Verdict
from amalgam.planning.kept import find_sensitivities, read_sensitivities
from amalgam.planning.problem import problem_of
from amalgam.planning.sensitivity import digest_of_weights
from amalgam.planning.shadow import Throttle, shadow
from amalgam.planning.use import Use, use_of_tally
from amalgam.planning.writing import rules_of
from amalgam.runtime.changes import RemapResult
from amalgam.runtime.served import shared_weights
from amalgam.runtime.token_ring import TokenRing
from amalgam.runtime.versions import VersionBook

logger = logging.getLogger("amalgam.autoplan")

MAX_DECISIONS, MAX_POINTS = 256, 1440
_SAFE_SHARE = 0.85
_OTHERS = "Sensitivities are of other weights than the files hold now."
_MEASURE = "Measure them again, then restart the server."


class Served(Protocol):
    """What is asked of the deployment; see `Deployment`."""

    @property
    def settings(self) -> Settings: ...
    @property
    def loader(self) -> ModelLoader: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def version(self) -> WeightVersion: ...
    @property
    def rules(self) -> tuple[Rule, ...]: ...
    @property
    def versions(self) -> VersionBook: ...
    @property
    def live_versions(self) -> Sequence[WeightVersion]: ...
    def adopt(self, loaded: LoadedVersion, rules: tuple[Rule, ...], version_id: int) -> RemapResult: ...


@dataclass(frozen=True)
class Point:
    """The drift at one moment; see `following.Drift`."""

    at: float
    num_tokens: int
    from_long: float | None
    from_planned: float | None
    weights_bytes: int
    divergence: float | None = None  # of the plan in force, where it was measured just then


def open_proposer(settings: Settings, loader: ModelLoader) -> Proposer | None:
    """What proposes plans; None if that is not wanted. Reads headers and sensitivities.

    Raises:
        ConfigError: statistics are off, the model has no experts, or sensitivities are missing.
        PlanError: no weight has a choice.
    """
    wanted = settings.planning.autoplan
    if not wanted.enabled:
        return None
    if not settings.statistics.enabled or not loader.spec.num_experts:
        raise ConfigError(
            "planning.autoplan follows the use of experts, and none is counted.",
            remedy="Turn statistics.enabled on, or planning.autoplan.enabled off. A dense model has nothing to follow.",
        )
    if settings.model.mixed_precision.default_source != BASE_SOURCE:
        raise ConfigError(
            f"default_source is {settings.model.mixed_precision.default_source!r}.",
            remedy="planning.autoplan names sources weight by weight: write it as a rule for '*'.",
        )
    problem = problem_of(loader)
    if wanted.sensitivities:
        folder = Path(wanted.sensitivities).expanduser()
    else:
        folder = find_sensitivities(state_folder() / "sensitivities", loader, problem)
    return Proposer(problem, read_sensitivities(folder, loader, problem))


@dataclass
class _Look:
    """What is known of a look so far, which is told even if it fails.

    Attributes:
        decision: without its outcome.
        choice: of the candidate; None: there is none.
        has_built: whether weights have been loaded for it.
    """

    decision: Decision
    choice: tuple[int, ...] | None = None
    has_built: bool = False


class Autoplan:
    """Looks at the traffic of a deployment in a thread of its own.

    Args:
        deployment: whose weights it changes.
        tracker: counts the use of the experts.

    Raises:
        ConfigError: a budget that is none, or that the plan in force does not keep; that plan has weights from
            sources that could not be chosen.
    """

    def __init__(self, deployment: Served, tracker: ExpertTracker, proposer: Proposer) -> None:
        self.settings: AutoplanSettings = deployment.settings.planning.autoplan
        self.ring = TokenRing(self.settings.sampled_share, self.settings.sampled_tokens)
        self._deployment = deployment
        self._tracker = tracker
        self._proposer = proposer
        self._dtype: torch.dtype = getattr(torch, deployment.settings.inference.dtype)
        history = tracker.settings.history_minutes
        self._minutes = min(self.settings.short_minutes, history), min(self.settings.long_minutes, history)
        self._budget = _budget_of(self.settings.budget, "planning.autoplan.budget")
        self._memory = _budget_of(self.settings.memory, "planning.autoplan.memory")
        if self._memory is not None and self._memory.kind != "bytes":
            raise ConfigError(f"planning.autoplan.memory is {self._memory.text!r}.", remedy="Give bytes: 40GB.")
        first = self._choice(deployment.version)
        self._first_cost = proposer.cost(first, "memory")
        limits = self.limits()
        if proposer.cost(first, limits.budget_kind) > limits.budget_bytes:
            raise ConfigError(
                f"planning.autoplan.budget is {self.settings.budget}; the plan to start with takes more.",
                remedy=f"Start with a plan within it: amalgam plan --budget {self.settings.budget} --out FILE.",
            )
        self._is_frozen = self.settings.frozen
        self._is_closing = threading.Event()
        self._thread = StoppableThread(self._run, "amalgam-autoplan", self._ask_to_stop)
        self._lock = threading.Lock()  # guards what is told
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._points: deque[Point] = deque(maxlen=MAX_POINTS)
        self._swaps: deque[float] = deque(maxlen=max(1, self.settings.max_swaps_per_hour))  # by the monotonic clock
        self._told: tuple[Any, ...] | None = None  # what the latest decision is about
        self._checked = deployment.loader, True  # and whether sensitivities are of its weights
        self._known = deployment.version.version_id  # another version is somebody else's
        self._planned: npt.NDArray[Any] | None = None  # the use that the known version is good for

    def start(self) -> None:
        self._thread.start()

    def note(self, request: Request, output: RequestOutput) -> None:
        """A request has ended; its tokens may be kept. In the step thread."""
        assert output.finish_reason is not None
        if output.error is None and request.observation.is_counted and not output.finish_reason.is_cut:
            self.ring.add(request.token_ids)

    def close(self) -> None:
        """What is being compared is given up, after the step under way; that of a large model is not waited for."""
        self._ask_to_stop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(EXIT_SECONDS)

    def set_frozen(self, is_frozen: bool) -> None:
        """Whether weights stay as they are. A change that is under way still comes to its end."""
        self._is_frozen = is_frozen
        logger.info("%s", "frozen: plans are proposed and not taken" if is_frozen else "not frozen any more")

    def describe(self) -> dict[str, Any]:
        """What `GET /autoplan` answers."""
        with self._lock:
            decisions, points = list(self._decisions), list(self._points)
        limits = self.limits()
        return {
            "frozen": self._is_frozen,
            "interval_seconds": self.settings.interval_seconds,
            "windows": {"short_minutes": self._minutes[0], "long_minutes": self._minutes[1]},
            "limits": {
                "budget": self.settings.budget or "as the first plan",
                "budget_bytes": int(limits.budget_bytes),
                "memory_bytes": limits.memory_bytes,
                "min_tokens": limits.min_tokens,
                "drift": limits.drift,
                "min_gain": limits.min_gain,
                "max_swaps_per_hour": limits.max_swaps_per_hour,
            },
            "weights_bytes": self._deployment.version.nbytes,
            "sampled_tokens": self.ring.num_tokens,
            "swaps_in_last_hour": following.swaps_within_hour(self._swaps, time.monotonic()),
            "weight_version": self._deployment.version.version_id,
            "points": [vars(point) for point in points],
            "decisions": [decision.as_json() for decision in decisions],
        }

    def explain(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        """Why an expert has its precision: use, sensitivity, and what the next steps up and down would do.

        Raises:
            RequestError: the model has no such expert, or its weights are others than sensitivities were measured of.
        """
        if not self._has_sensitivities():
            raise RequestError(_OTHERS, remedy=_MEASURE)
        version = self._deployment.version
        use = self._use() or self._use_so_far()
        choice = self._choice(version)
        projections = following.explain(self._proposer, use, choice, layer_id, expert_id)
        if not projections:
            raise RequestError(
                f"Layer {layer_id} has no expert {expert_id} whose precision could be chosen.",
                remedy="GET /experts/precision_map lists them.",
            )
        layer = [mass for (each, _), mass in use.mass.items() if each == layer_id]
        mass = use.mass[layer_id, expert_id]
        return {
            "layer_id": layer_id,
            "expert_id": expert_id,
            "weight_version": version.version_id,
            "use": {
                "where": use.where,
                "num_tokens": use.num_tokens,
                "gate_mass_per_token": mass,
                "times_even_share": mass / (sum(layer) / len(layer)),
                "rank_in_layer": 1 + sum(other > mass for other in layer),
            },
            "projections": projections,
        }

    def limits(self) -> Limits:
        problem, wanted = self._proposer.problem, self.settings
        kind: Literal["memory", "stored"] = "memory"
        size = self._first_cost
        if self._budget is not None and self._budget.kind == "bits":
            kind, size = "stored", self._budget.value * problem.num_weights / 8
        elif self._budget is not None:
            size = self._budget.value - problem.fixed_memory
        memory = int(self._memory.value) if self._memory is not None else self._weights_that_fit()
        return Limits(kind, size, memory, wanted.min_tokens, wanted.drift, wanted.min_gain, wanted.max_swaps_per_hour)

    def look(self) -> Decision:
        """One look at the traffic, and what comes of it."""
        at, version = time.time(), self._deployment.version
        short, long = (self._tracker.snapshot(minutes).tally for minutes in self._minutes)
        counts, tokens = short.counts.sum(axis=0), int(short.num_tokens.sum())
        if version.version_id != self._known and tokens >= self.settings.min_tokens:
            # Somebody else has chosen it with this traffic in view, so it stays until the use drifts from there.
            self._known, self._planned = version.version_id, counts
        planned = self._planned if version.version_id == self._known else None
        look = _Look(Decision(at, "failed", "", following.drift_of(counts, long.counts.sum(axis=0), planned, tokens)))
        try:
            use = use_of_tally(short, self._tracker.layer_ids, "live", self._tracker.expert_counts) if tokens else None
            verdict = self._decide(look, version, use)
        except UnavailableError:
            raise
        except ConflictError as error:
            verdict = Verdict("overtaken", str(error))
        except AmalgamError as error:
            verdict = Verdict("failed", str(error))
        except Exception as error:
            logger.exception("a look at the traffic has failed; weights stay as they are")
            verdict = Verdict("failed", f"{type(error).__name__}: {error}")
        if look.has_built:  # the reference, and a candidate that is not committed: nothing holds them here any more
            self._deployment.versions.has_freed()
        look.decision = decision = replace(look.decision, outcome=verdict.outcome, reason=verdict.reason)
        if decision.is_settled:
            self._known, self._planned = decision.version or version.version_id, counts
        self._note(look)
        return decision

    def _decide(self, look: _Look, version: WeightVersion, use: Use | None) -> Verdict:
        limits = self.limits()
        verdict = following.before_proposing(look.decision.drift, limits)
        if verdict is not None or use is None:
            return verdict or Verdict("few_tokens", "No token in the short window.")
        if not self._has_sensitivities():
            return Verdict("failed", f"{_OTHERS} {_MEASURE}")
        now = self._choice(version)
        candidate = self._proposer.propose(use, now, limits)
        look.choice = candidate.choice
        look.decision = replace(
            look.decision,
            candidate_bytes=candidate.memory_bytes,
            num_changed=sum(one != other for one, other in zip(candidate.choice, now, strict=True)),
            expected_gain=candidate.expected_gain,
        )
        reference, transient = self._reference(candidate, now, limits)
        verdict = following.before_shadowing(
            candidate,
            now,
            limits,
            self._swaps,
            time.monotonic(),
            is_frozen=self._is_frozen,
            transient_bytes=transient,
        )
        if verdict is not None:
            return verdict
        windows = self.ring.read(self._minutes[0] * 60)
        if len(windows) < MIN_UNITS:
            return Verdict("few_requests", f"{len(windows)} sampled requests to compare with, {MIN_UNITS} are needed.")
        return self._try(look, version, candidate, reference, windows, limits)

    def _try(
        self,
        look: _Look,
        version: WeightVersion,
        candidate: Candidate,
        reference: Sequence[int],
        windows: Sequence[Sequence[int]],
        limits: Limits,
    ) -> Verdict:
        loader, problem = self._deployment.loader, self._proposer.problem
        rules = (*build_rules(rules_of(loader, problem, candidate.choice)), *placing(self._deployment.rules))
        throttle = Throttle(self.settings.max_share, self._check, self._is_closing.wait)
        look.has_built = True
        loaded = loader.build(loader.plan(rules), self._deployment.versions.next_id(), version, throttle)
        shadowed = self._shadow(loader, version, loaded.version, reference, windows, throttle)
        look.decision = replace(look.decision, shadowed=shadowed)
        verdict = following.after_shadowing(shadowed, limits, is_frozen=self._is_frozen)
        if verdict.outcome == "committed":
            result = self._deployment.adopt(loaded, rules, version.version_id)
            self._swaps.append(time.monotonic())
            look.decision = replace(look.decision, version=result.version)
        return verdict

    def _has_sensitivities(self) -> bool:
        """Whether they are of the weights in the files that are served now."""
        loader, is_theirs = self._checked
        if loader is not self._deployment.loader:
            loader = self._deployment.loader
            is_theirs = digest_of_weights(loader, self._proposer.problem) == self._proposer.digest
            self._checked = loader, is_theirs
        return is_theirs

    def _shadow(
        self,
        loader: ModelLoader,
        now: WeightVersion,
        candidate: WeightVersion,
        choice: Sequence[int],
        windows: Sequence[Sequence[int]],
        throttle: Throttle,
    ) -> Shadowed:
        """The reference is in memory only here."""
        planned = self._planned_weights(loader, choice)
        reference = loader.build(planned, 0, shared_weights(planned, now, candidate), throttle).version
        return shadow(loader, self._dtype, (reference, now, candidate), self._name_of(choice), windows, throttle)

    def _planned_weights(self, loader: ModelLoader, choice: Sequence[int]) -> list[PlannedWeight]:
        mapping = self._proposer.problem.mapping(choice)
        found = []
        for weight in loader.plan(()):
            source = mapping.get(weight.choice.name)
            other = None if source is None else loader.candidate(weight.choice.name, source)
            found.append(weight if other is None else other)
        return found

    def _reference(self, candidate: Candidate, now: Sequence[int], limits: Limits) -> tuple[list[int], int]:
        """The widest choice that there is room for beside versions in use and the candidate, and what all would take.

        Where there is room for none that is wider than both plans, what the narrowest of them would take.
        """
        problem = self._proposer.problem
        widest = [len(item.options) - 1 for item in problem.items]
        uniform = [problem.uniform(source) for source in reversed(problem.sources)]
        least = max(problem.stored_bytes(now), problem.stored_bytes(candidate.choice))
        alive = _union_bytes(self._deployment.live_versions)
        found: list[tuple[list[int], int]] = []
        for choice in (widest, *(each for each in uniform if each is not None)):
            if problem.stored_bytes(choice) <= least and choice != widest:
                continue
            extra = 0
            for item, index, other, own in zip(problem.items, choice, candidate.choice, now, strict=True):
                extra += sum(item.options[place].memory_bytes for place in {index, other} - {own})
            found.append((choice, alive + extra))
            if alive + extra <= limits.memory_bytes:
                break
        return found[-1]

    def _name_of(self, choice: Sequence[int]) -> str:
        used = {item.options[index].source for item, index in zip(self._proposer.problem.items, choice, strict=True)}
        return ", ".join(sorted(used))

    def _choice(self, version: WeightVersion) -> list[int]:
        """The options that a version has.

        Raises:
            ConfigError: a weight comes from a source that is none of its options.
        """
        choice = []
        for item in self._proposer.problem.items:
            origin = version.origins[item.slot]
            index = item.index_of(origin.source)
            if index is None:  # a copy of base's
                base = item.index_of(BASE_SOURCE)
                if base is None or item.options[base].format != origin.stored_format:
                    raise ConfigError(
                        f"{item.name!r} comes from source {origin.source!r}, which planning leaves out.",
                        remedy="Map it to another source, or turn planning.autoplan.enabled off.",
                    )
                index = base
            choice.append(index)
        return choice

    def _use(self) -> Use | None:
        """Of the short window; None where that has too few tokens."""
        tally = self._tracker.snapshot(self._minutes[0]).tally
        enough = int(tally.num_tokens.sum()) >= self.settings.min_tokens
        where = f"the last {self._minutes[0]:g} minutes"
        counts = self._tracker.expert_counts
        return use_of_tally(tally, self._tracker.layer_ids, where, counts) if enough else None

    def _use_so_far(self) -> Use:
        """
        Raises:
            RequestError: nothing has been counted.
        """
        tally = self._tracker.snapshot().tally
        if not int(tally.num_tokens.sum()):
            raise RequestError("No token has been counted yet.", remedy="Send some requests first.")
        return use_of_tally(tally, self._tracker.layer_ids, "since the last reset", self._tracker.expert_counts)

    def _weights_that_fit(self) -> int:
        """Those that are there, and what else may be taken of the device's memory."""
        alive = _union_bytes(self._deployment.live_versions)
        device = self._deployment.loader.device
        if device.type == "cuda":
            available, total = torch.cuda.mem_get_info(device)
        else:
            machine, engine = detect_machine(), self._deployment.engine
            proposer = None if engine.speculator is None else engine.speculator.proposer
            caches = engine.kv_cache_bytes + engine.state_cache_bytes
            caches += proposer.kv_cache_bytes if isinstance(proposer, DraftProposer) else 0
            # Pages of the caches that nothing has written yet count as available.
            available = machine.available_bytes - caches
            total = machine.memory_bytes
        return alive + max(0, available - int((1 - _SAFE_SHARE) * total))

    def _note(self, look: _Look) -> None:
        """Of looks in a row without an event, only the latest is kept, and of those about one candidate."""
        decision = look.decision
        drift, shadowed = decision.drift, decision.shadowed
        divergence = None
        if shadowed is not None:
            divergence = (shadowed.candidate if decision.outcome == "committed" else shadowed.now).value
        size = self._deployment.version.nbytes
        point = Point(decision.at, drift.num_tokens, drift.from_long, drift.from_planned, size, divergence)
        is_failure = decision.outcome in following.FAILED
        about = decision.outcome, look.choice, decision.reason if is_failure else ""
        is_same = about == self._told and shadowed is None
        self._told = about
        level = logging.WARNING if is_failure else logging.INFO
        logger.log(
            logging.DEBUG if is_same or decision.outcome in following.QUIET else level,
            "%s: %s drift=%s from_long=%s tokens=%d changed=%s bytes=%s expected_gain=%s version=%s",
            decision.outcome,
            decision.reason,
            _figure(drift.from_planned),
            _figure(drift.from_long),
            drift.num_tokens,
            decision.num_changed,
            decision.candidate_bytes,
            _figure(decision.expected_gain),
            decision.version,
        )
        with self._lock:
            self._points.append(point)
            if is_same:
                self._decisions.pop()
            self._decisions.append(decision)

    def _check(self) -> None:
        if self._is_closing.is_set():
            raise UnavailableError("The model has been closed.", remedy="Open it again.")

    def _ask_to_stop(self) -> None:
        self._is_closing.set()

    def _run(self) -> None:
        be_quiet()
        while not self._is_closing.wait(self.settings.interval_seconds):
            try:
                self.look()
            except UnavailableError:
                return
            except Exception:
                logger.exception("the traffic could not be looked at; weights stay as they are")


def _budget_of(text: str, name: str) -> Budget | None:
    if not text:
        return None
    budget = parse_budget(text)
    if budget.kind == "speed" or budget.devices:
        raise ConfigError(f"{name} is {text!r}.", remedy="Give bytes or bits: 40GB, 4.5bpw.")
    return budget


def _union_bytes(versions: Iterable[WeightVersion]) -> int:
    """Of weights that several versions share, once."""
    return sum({id(weight): weight.nbytes for version in versions for weight in version.weights}.values())


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"
