"""A student learns from a teacher: what `amalgam distill` does.

In: settings of both, files of texts or answers. Out: a checkpoint folder in the layouts that the student came in, with
what it has cost and gained in `distillation.json`; it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.base.counting import counted
from amalgam.base.files import check_free, partial_folder, replace_file, resumable_folder, writing
from amalgam.base.folders import read_json
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError, ConfigError, UnsupportedError
from amalgam.evaluation.confidence import Bootstrap, Interval
from amalgam.evaluation.quality import Figures, Quality, Reference, remarks, summarise
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import Slot
from amalgam.runtime.device import choose_device
from amalgam.runtime.threads import set_threads
from amalgam.text.files import has_tokenizer
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.distill_texts import TextsToLearn, read_material
from amalgam.tools.evaluate import reference_settings
from amalgam.tools.export.checkpoint import CheckpointJob
from amalgam.tools.export.choosing import Decision, Engine, changes_of, choose, no_units
from amalgam.tools.export.contract import PlannedModel
from amalgam.tools.export.exporting import open_plan
from amalgam.tools.export.targets.compressed import dialect
from amalgam.tools.initial_student import Beginning, is_bare, make_student
from amalgam.training.drawing import curve_html
from amalgam.training.initial import drawn_matrices
from amalgam.training.losses import DistillationLoss
from amalgam.training.selection import HEALING, LEARNING, Kind, Selection, has_trainable_scales, trained_weights
from amalgam.training.state import is_begun
from amalgam.training.student import Student
from amalgam.training.trainer import DistillationTrainer, Look, Outcome, Teacher, TrainingOptions
from amalgam.version import __version__

REPORT = "distillation.json"
_STATE, _INITIAL = "training", "initial"  # folders inside the unfinished one
_BYTES_PER_PARAMETER = 16  # now, at its best, and two means of the optimizer
_SPARE_BYTES = 2**26
_MAX_NAMED = 3
_HEALING_RATE, _MATRIX_RATE = 1e-3, 2e-2  # shares of a weight's values


@dataclass(frozen=True)
class DistillOptions:
    """What may be asked of a distillation.

    Attributes:
        kinds: what learns; None: of a quantized student `HEALING`, of another one `LEARNING`.
        rank: see `Selection`.
        learning_rate: in place of that of `training`; None: 0.001, or 0.02 where whole matrices learn.
        beginning: of a student that is yet to be made.
    """

    texts: TextsToLearn = field(default_factory=TextsToLearn)
    loss: DistillationLoss = field(default_factory=DistillationLoss)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    kinds: frozenset[Kind] | None = None
    rank: int | None = None
    learning_rate: float | None = None
    beginning: Beginning = field(default_factory=Beginning)


@dataclass(frozen=True)
class DistillReport:
    """What was learned.

    Attributes:
        before, after: the student on held-out text against the teacher, as it is served.
        difference: of its divergence, as a share, by draws of the same documents; None: it began without any.
        before_bytes, after_bytes: of its weights, as stored.
        trained: kinds of weights.
        options: with the learning rate that was chosen, in those of `training` too.
    """

    folder: Path
    teacher: str
    student: str
    before: Quality
    after: Quality
    teacher_quality: Quality
    difference: Interval | None
    before_bytes: int
    after_bytes: int
    trained: Sequence[str]
    num_parameters: int
    outcome: Outcome
    remarks: Sequence[str]
    options: DistillOptions
    left_out: Sequence[str] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        options = asdict(self.options)
        texts, kinds = options["texts"], options["kinds"]
        options["texts"] = texts | {"answers": None if texts["answers"] is None else str(texts["answers"])}
        options["kinds"] = None if kinds is None else sorted(kinds)
        return {**asdict(self), "folder": str(self.folder), "options": options}


def distill(
    teacher: Settings | None,
    student: Settings | None,
    folder: Path,
    options: DistillOptions,
    *,
    on_look: Callable[[Look], None] = lambda look: None,
    progress: Progress | None = None,
) -> DistillReport:
    """Train a student against a teacher, and write it into `folder`; a run that was interrupted goes on.

    Args:
        teacher: None: the student with every weight from base.
        student: None: a smaller model of the teacher's kind, as `options.beginning` says.
        on_look: is told how the student does on held-out text.

    Raises:
        ConfigError: options that do not fit each other, texts that cannot be read, a loss that is NaN.
        CheckpointError: the folder exists, there is no room, a model is damaged.
        ConflictError: an interrupted run had other options; somebody else is writing the folder.
        UnsupportedError: a weight that the result cannot hold as it is.
        AmalgamError: whatever is wrong with a plan.
    """
    with resumable_folder(folder, lambda partial: is_begun(partial / _STATE)) as partial, writing(folder):
        return _Distillation(teacher, student, partial, folder.name, options, progress).run(folder, on_look)


def check_before_answers(
    teacher: Settings | None, student: Settings | None, folder: Path, options: DistillOptions
) -> None:
    """Raise what `distill` would and what can be told at once, so that no teacher writes answers for nothing.

    Raises:
        ConfigError: no teacher, kinds of weights that there are not, another tokenizer.
        CheckpointError: the folder exists.
        AmalgamError: whatever is wrong with a plan.
    """
    check_free(folder)
    if options.kinds is not None:
        Selection(options.kinds, options.rank)
    settings = teacher_settings(teacher, student)
    device = choose_device(settings.inference.device_map)
    own = _tokenizer_of(open_plan(settings, None, device))
    bare = _bare_folder(student)
    if student is not None and bare is None:
        _check_tokenizers(own, [_tokenizer_of(open_plan(student, None, device))])
    elif bare is not None and has_tokenizer(bare):
        _check_tokenizers(own, [Tokenizer.load(bare)])


def teacher_settings(teacher: Settings | None, student: Settings | None) -> Settings:
    """The teacher's settings, or those of the student with every weight from base.

    Raises:
        ConfigError: there is neither.
    """
    if teacher is not None:
        return teacher
    if student is None or _bare_folder(student) is not None:
        raise ConfigError("No teacher is given.", remedy="Name one with --teacher.")
    return reference_settings(student)


class _Distillation:
    """One run, in the folder that will be the student's."""

    def __init__(
        self,
        teacher: Settings | None,
        student: Settings | None,
        partial: Path,
        name: str,
        options: DistillOptions,
        progress: Progress | None,
    ) -> None:
        bare = _bare_folder(student)
        self._bare_config = None if bare is None else read_json(bare, CONFIG_NAME)
        teacher = teacher_settings(teacher, student)
        self._name = name
        self._partial, self._options, self._progress = partial, options, progress
        set_threads(teacher.engine)
        self._device = choose_device(teacher.inference.device_map)
        self._teacher = open_plan(teacher, progress, self._device)
        self._student = open_plan(self._begun(student), progress, self._device)
        self._remarks: list[str] = []
        if options.beginning.start != "random" and (bare is not None or options.beginning.shape is not None):
            self._note_drawn()
        self._tokenizer = _tokenizer_of(self._teacher)
        self._check_vocabulary(bare)
        longest = min(self._teacher.spec.max_positions, self._student.spec.max_positions)
        self._material = read_material(options.texts, self._tokenizer, longest)
        self._selection = self._select()
        self._decisions = self._decide()

    # --- What is trained ---

    def _begun(self, student: Settings | None) -> Settings:
        """The student's settings; one that has no weights yet gets some."""
        bare, beginning = _bare_folder(student), self._options.beginning
        if student is not None and bare is None:
            if beginning.shape is not None or beginning.start is not None:
                raise ConfigError(
                    f"{student.model.base_path} has weights: it is not made anew.",
                    remedy="Leave --width, --layers and --init out, or name the teacher alone.",
                )
            return student
        if bare is None and beginning.shape is None:
            raise ConfigError("No student is given.", remedy="Name one with --student, or give --width or --layers.")
        folder = self._partial / _INITIAL
        if not folder.exists():
            make_student(self._teacher, bare, beginning, folder)
        settings = student or self._teacher.settings
        return settings.replace(model={"base_path": str(folder), "name": self._name})

    def _note_drawn(self) -> None:
        names = {weight.slot.name: weight.choice.name for weight in self._student.planned}
        drawn = [names[slot] for slot in drawn_matrices(self._student.spec, self._teacher.spec)]
        if drawn:
            some = ", ".join(drawn[:_MAX_NAMED]) + (", …" if len(drawn) > _MAX_NAMED else "")
            self._remarks.append(
                f"{counted(len(drawn), 'weight')} began at random: the teacher has no slice for them: {some}."
            )

    def _select(self) -> Selection:
        is_quantized = any(not weight.format.is_wide for weight in self._student.planned)
        kinds = self._options.kinds or (HEALING if is_quantized else LEARNING)
        return Selection(kinds, self._options.rank)

    def _decide(self) -> list[Decision]:
        """How each weight is stored in the end: as it is.

        Raises:
            UnsupportedError: some cannot be.
        """
        found = choose(self._student, Engine("a trained checkpoint", _is_kept, no_units), "none")
        changed = [change for change in changes_of(self._student, found) if not change.is_exact]
        if changed:
            some = ", ".join(f"{change.name} ({change.before})" for change in changed[:_MAX_NAMED])
            raise UnsupportedError(
                f"The student stores {counted(len(changed), 'weight')} in ways that nothing can be put into again: "
                f"{some}.",
                remedy="Take them from a checkpoint that `amalgam quantize` has made.",
            )
        return found

    def _check_vocabulary(self, bare: Path | None) -> None:
        mine, theirs = self._student.spec.vocab_size, self._teacher.spec.vocab_size
        if mine != theirs:
            raise ConfigError(
                f"The student has {mine} tokens and the teacher {theirs}.",
                remedy="A divergence needs one vocabulary: choose a student of the teacher's kind, or let the teacher "
                "write answers and train the student on these with its own base as the teacher and --alpha 0.",
            )
        self._tokenizer.check_vocabulary(theirs)
        others = [_tokenizer_of(self._student)]
        if bare is not None and has_tokenizer(bare):
            others.append(Tokenizer.load(bare))
        _check_tokenizers(self._tokenizer, others)

    # --- The run ---

    def run(self, folder: Path, on_look: Callable[[Look], None]) -> DistillReport:
        student = self._made_student()
        self._check_space(folder, student)
        teacher = self._opened(self._teacher, "the teacher")
        reference = Reference(teacher, self._material.held_out, self._progress)
        own = summarise(reference.figures(), has_reference=False)
        vocab_size = self._teacher.spec.vocab_size
        self._remarks += remarks(own, self._material.held_out, vocab_size)
        before = reference.figures(self._opened(self._student, "the student"), self._progress)
        trainer = DistillationTrainer(
            student, Teacher(teacher), self._options.loss, self._training(), self._material.held_out.windows, on_look
        )
        state = self._partial / _STATE
        state.mkdir(exist_ok=True)
        outcome = trainer.train(self._material.lessons, state, self._identity(), self._progress)
        left_out = self._write(student)
        written = open_plan(self._settings_of(self._partial), self._progress, self._device)
        after = reference.figures(self._opened(written, "the trained student"), self._progress)
        report = DistillReport(
            folder=folder,
            teacher=self._teacher.name,
            student=self._student.name,
            before=summarise(before),
            after=summarise(after),
            teacher_quality=own,
            difference=_difference(before, after),
            before_bytes=sum(weight.nbytes for weight in self._student.planned),
            after_bytes=sum(weight.nbytes for weight in written.planned),
            trained=sorted(self._selection.kinds),
            num_parameters=sum(leaf.numel() for leaf in student.parameters.values()),
            outcome=outcome,
            remarks=self._remarks,
            options=replace(self._options, training=self._training()),
            left_out=left_out,
        )
        replace_file(self._partial / REPORT, json.dumps(report.as_json(), indent=1))
        shutil.rmtree(self._partial / _INITIAL, ignore_errors=True)
        shutil.rmtree(state)
        return report

    def _training(self) -> TrainingOptions:
        rate = self._options.learning_rate
        if rate is None:
            rate = _MATRIX_RATE if "wide" in self._selection.kinds else _HEALING_RATE
        return replace(self._options.training, learning_rate=rate)

    def _made_student(self) -> Student:
        planned = self._student.planned
        device = self._device
        weights = {weight.slot.name: weight.unprepared().to(device) for weight in planned}
        bits = {weight.slot.name: weight.stored.bits for weight in planned if weight.quantize_to is None}
        bits |= {weight.slot.name: weight.quantize_to.bits for weight in planned if weight.quantize_to is not None}
        stuck = [slot for slot, weight in weights.items() if _is_stuck(weight)]
        if stuck and self._selection.kinds & {"scales", "codes"}:
            self._remarks.append(
                f"The scales of {counted(len(stuck), 'weight')} are powers of two, and stay as they are."
            )
        trained = trained_weights(
            self._student.spec.slots, weights, bits, self._selection, self._wide_of(), self._options.training.seed
        )
        self._job({slot: weights[slot] for slot in trained})  # refuses what cannot be written
        return Student(self._student.spec, weights, trained, self._material.longest, device)

    def _wide_of(self) -> Callable[[str], Tensor | None]:
        """The teacher's weights, where it is the model that the student was made from."""
        if self._teacher.spec != self._student.spec:
            return lambda slot: None
        found: Mapping[str, PlannedWeight] = {weight.slot.name: weight for weight in self._teacher.planned}
        return lambda slot: found[slot].unprepared().dequantize(torch.float32).to(self._device)

    def _opened(self, model: PlannedModel, name: str) -> Contestant:
        dtype: torch.dtype = getattr(torch, model.settings.inference.dtype)
        return open_contestant(
            f"{name} ({model.name})", model.loader, model.planned, dtype, self._options.texts.window, self._progress
        )

    def _identity(self) -> dict[str, Any]:
        """What the student's numbers depend on, beside the options of training."""
        return {
            "teacher": _digest(self._teacher),
            "student": _digest(self._student),
            "beginning": {**asdict(self._options.beginning), "config": self._bare_config},
            "texts": self._material.digest,
            "trained": sorted(self._selection.kinds),
            "rank": self._selection.rank,
            "dtype": self._teacher.settings.inference.dtype,
            "activation": self._teacher.settings.inference.activation,
            "device": self._device.type,
            "version": __version__,
        }

    def _write(self, student: Student) -> list[str]:
        values = {slot: trained.packed().to(torch.device("cpu")) for slot, trained in student.trained.items()}
        return list(self._job(values).write(self._partial, self._progress).left_out)

    def _job(self, values: Mapping[str, PackedWeight]) -> CheckpointJob:
        """What writes the student with other values of some slots.

        Raises:
            UnsupportedError: one of them stands with others in a tensor that cannot be divided.
        """
        by_slot = {weight.slot.name: weight.choice.name for weight in self._student.planned}
        named = {by_slot[slot]: value for slot, value in values.items()}
        return CheckpointJob(self._student, self._decisions, _dialect(), values=named)

    def _settings_of(self, folder: Path) -> Settings:
        """The student as it was written."""
        settings = self._student.settings
        model = {"base_path": str(folder), "name": f"{self._student.name}, trained"}
        inference = settings.inference.model_dump() | {"load_in_8bit": False, "load_in_4bit": False}
        return settings.replace(model=model, inference=inference)

    def _check_space(self, folder: Path, student: Student) -> None:
        """Raise CheckpointError unless there is room for the state, twice while it is written, and for the result."""
        num_parameters = sum(leaf.numel() for leaf in student.parameters.values())
        begun = sum(file.stat().st_size for file in self._partial.rglob("*") if file.is_file())
        needed = 2 * _BYTES_PER_PARAMETER * num_parameters + sum(weight.nbytes for weight in self._student.planned)
        free = shutil.disk_usage(self._partial).free + begun
        if free < needed + _SPARE_BYTES:
            raise CheckpointError(
                f"{partial_folder(folder)} needs {needed + _SPARE_BYTES} bytes for the training, and {free} are free.",
                remedy="Make room, choose another folder, or train fewer weights (--train, --rank).",
            )


def _tokenizer_of(model: PlannedModel) -> Tokenizer:
    return Tokenizer.load(model.loader.base_folder, model.loader.base_metadata)


def _check_tokenizers(own: Tokenizer, others: Sequence[Tokenizer]) -> None:
    """Raise ConfigError if a token of the teacher's is another one for a student."""
    tokens = [own.first_difference(other) for other in others]
    different = next((token for token in tokens if token is not None), None)
    if different is not None:
        raise ConfigError(
            f"Token {different} is another one for the student than for the teacher.",
            remedy="A divergence needs one tokenizer: choose a student of the teacher's kind.",
        )


def write_curve(report: DistillReport, file: Path) -> None:
    """The curve of a report as a page."""
    runs = {report.student: (report.outcome.curve, report.outcome.looks)}
    with writing(file):
        replace_file(file, curve_html(runs, f"{report.student} learns from {report.teacher}"))


def _difference(before: Figures, after: Figures) -> Interval | None:
    if not before.divergence.any():
        return None
    return Bootstrap(before.units).ratio_of_means(after.divergence, before.divergence)


def _dialect() -> Any:
    return dialect("a trained checkpoint", lambda slot, form: None, keeps_stacked=True)


def _is_kept(slot: Slot, form: Any) -> bool:
    return not slot.is_transposed


def _is_stuck(weight: Any) -> bool:
    return weight.layout.name != "dense" and not has_trainable_scales(weight)


def _bare_folder(student: Settings | None) -> Path | None:
    """The student's folder, if it holds no weights yet."""
    folder = None if student is None else Path(student.model.base_path).expanduser()
    return folder if folder is not None and is_bare(folder) else None


def _digest(model: PlannedModel) -> str:
    """Names a model's weights, and the config.json that says what is computed with them."""
    keys = [(weight.slot.name, weight.key) for weight in model.planned]
    config = json.dumps(model.base.config, sort_keys=True, default=repr)
    return hashlib.sha256(repr((keys, config)).encode()).hexdigest()[:16]
