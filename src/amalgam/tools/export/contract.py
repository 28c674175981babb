"""What an exporter is given, and what it says and writes.

In: nothing; these are nouns. A target is prepared from headers alone: it says of each weight how it will be stored, so
that `--dry-run`, `--strict` and the check of free space need no byte of data. Then it writes into an empty folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.composition.source import Source
from amalgam.config.settings import Settings
from amalgam.models.spec import Family, ModelSpec

Share = Literal["widest", "narrowest", "none"]


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """What is exported: a checked plan, and the base checkpoint with all that stands beside its weights.

    Attributes:
        name: as people call it.
        planned: every weight of the model with the source that it comes from, in order of use.
    """

    name: str
    settings: Settings
    loader: ModelLoader
    planned: tuple[PlannedWeight, ...]

    @property
    def base(self) -> Source:
        return self.loader.base

    @property
    def family(self) -> Family:
        return self.loader.family

    @property
    def spec(self) -> ModelSpec:
        return self.loader.spec

    @cached_property
    def by_name(self) -> Mapping[str, PlannedWeight]:
        """By logical name."""
        return {weight.choice.name: weight for weight in self.planned}


@dataclass(frozen=True)
class ExportOptions:
    """What can be asked of a target; `Target.options` names the fields that it honours.

    Attributes:
        share: where an engine computes several weights at once and wants one format for them: the format of the
            widest of them, so that none loses precision, or of the narrowest, so that none takes more room. `none`:
            each keeps its own, for engines that can.
        activations: `dynamic`: declare 8-bit activations with scales that are found as the engine runs beside all
            8-bit weights. None: only where the engine has no other way.
        type: the engine's type, by its own name, for weights whose values have to be rounded. None: the nearest that is
            at least as wide.
    """

    share: Share = "widest"
    activations: Literal["dynamic"] | None = None
    type: str | None = None


@dataclass(frozen=True)
class Change:
    """A weight that is stored otherwise than in the plan.

    Attributes:
        name: logical name.
        before, after: names of formats.
        is_exact: every value stays what it is.
        reason: for people, a clause: `llama.cpp has no zero points in 4 bits`.
    """

    name: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    is_exact: bool
    reason: str


@dataclass(frozen=True)
class Written:
    """What was made besides the weights.

    Attributes:
        left_out: files and tensors of the base checkpoint that are not in the folder.
        notes: sentences for people.
    """

    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()


class Job(ABC):
    """One export, decided and not begun.

    Attributes:
        changes: weights that are stored otherwise than in the plan.
        nbytes: of the files that will be written, about.
        notes: what users have to know before they start, in sentences.
    """

    changes: Sequence[Change] = ()
    nbytes: int
    notes: Sequence[str] = ()

    @abstractmethod
    def write(self, folder: Path, progress: Progress | None) -> Written:
        """Fill a folder, which gets its name when this returns.

        The folder may hold what an earlier run has left, if `has_begun` says that this is worth keeping.

        Raises:
            AmalgamError: a source is damaged, or the folder cannot be written.
        """

    def has_begun(self, folder: Path) -> bool:
        """Whether a folder that was left unfinished holds anything that the next run can go on from."""
        return False


@dataclass(frozen=True)
class Target:
    """A layout that other engines open.

    Attributes:
        name: as `--to` has it.
        summary: what is written and who opens it, for the help text: one line.
        prepare: decides; reads headers only.
        options: fields of `ExportOptions` that it honours.
    """

    name: str
    summary: str
    prepare: Callable[[PlannedModel, ExportOptions], Job]
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ExportReport:
    """What was exported, or would be.

    Attributes:
        nbytes: of the folder's files; estimated where nothing was written.
        plan_bytes: of the weights as the sources store them.
        divergence: `before` and `after` → mean KL divergence from the base checkpoint in nats a token, of the plan and
            of what was written; empty if nobody asked.
    """

    folder: Path
    target: str
    model: str
    is_written: bool
    nbytes: int
    plan_bytes: int
    changes: Sequence[Change]
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()
    divergence: Mapping[str, Any] = field(default_factory=dict)
