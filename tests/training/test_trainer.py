"""Training: it lessens what it is to lessen, ends when nothing gets better, and goes on behind a kill to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.errors import CheckpointError, ConfigError, ConflictError
from amalgam.evaluation.quality import scored
from amalgam.evaluation.running import open_contestant
from amalgam.evaluation.texts import Window
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.registry import all_families
from amalgam.training.lessons import batches, parts_of
from amalgam.training.losses import DistillationLoss
from amalgam.training.selection import LEARNING, Kind, Selection, trained_weights
from amalgam.training.student import Student
from amalgam.training.trainer import DistillationTrainer, Teacher, TrainingOptions
from tests.errors import raises
from tests.models.tiny import save_tiny

CPU = torch.device("cpu")
OPTIONS = TrainingOptions(
    steps=6, batch_tokens=48, part_tokens=32, learning_rate=3e-3, eval_every=2, save_every=2, patience=0
)
IDENTITY = {"teacher": "tiny"}
Make = Callable[..., DistillationTrainer]


def lesson(seed: int, size: int = 16) -> Window:
    drawn = torch.randint(3, 250, (size,), generator=torch.Generator().manual_seed(seed))
    return Window("", seed, tuple(drawn.tolist()), 0.0)


LESSONS, HELD_OUT = [lesson(seed) for seed in range(9)], [lesson(seed) for seed in range(20, 23)]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Trainers of a tiny model with noise in its weights, whose teacher is the same without."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(next(family for family in all_families() if family.name == "qwen3_moe"), folder)
    loader = ModelLoader(ModelSettings(base_path=str(folder)), InferenceSettings(dtype="float32"), CPU, threads=1)
    planned = loader.plan()
    teacher = Teacher(open_contestant("tiny", loader, planned, torch.float32, 32))
    weights: dict[str, PackedWeight] = {}
    generator = torch.Generator().manual_seed(0)
    for weight in planned:
        wide = weight.unprepared().dequantize(torch.float32)
        noise = torch.randn(wide.shape, generator=generator) * (0.1 * wide.std() if wide.dim() > 1 else 0.0)
        weights[weight.slot.name] = dense(wide + noise)

    def made(
        options: TrainingOptions = OPTIONS,
        loss: DistillationLoss = DistillationLoss(),  # noqa: B008
        damage: float = 0.0,
        kinds: frozenset[Kind] = LEARNING,
    ) -> DistillationTrainer:
        own = {**weights, "norm": dense(weights["norm"].dense + damage)}
        trained = trained_weights(loader.spec.slots, own, {}, Selection(kinds), lambda slot: None, 0)
        return DistillationTrainer(Student(loader.spec, own, trained, 32, CPU), teacher, loss, options, HELD_OUT)

    return made


def test_a_student_comes_nearer_to_its_teacher(make: Make, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=12, learning_rate=0.05)
    found = make(options, damage=0.5, kinds=frozenset({"norms"})).train(LESSONS, tmp_path, IDENTITY)
    assert [look.step for look in found.looks] == [0, 2, 4, 6, 8, 10, 12]
    assert found.looks[-1].divergence < 0.7 * found.looks[0].divergence
    assert found.best_step == 12 and not found.is_stopped and len(found.curve) == 12
    assert found.curve[0].distill_loss == found.curve[0].total_loss and found.curve[0].learning_rate == 0.05
    assert found.num_tokens == 12 * 48


@pytest.mark.parametrize("loss", [DistillationLoss(2.0, 0.7), DistillationLoss(1.0, 0.0)])
def test_a_killed_run_gives_what_it_would_have_given(make: Make, loss: DistillationLoss, tmp_path: Path) -> None:
    whole = make(loss=loss).train(LESSONS, tmp_path, IDENTITY)

    class Killed(BaseException):
        pass

    killed = tmp_path / "killed"
    killed.mkdir()
    steps = 0

    def report(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:  # one step behind the last that was saved
            raise Killed

    with pytest.raises(Killed):
        make(loss=loss).train(LESSONS, killed, IDENTITY, report)
    trainer = make(loss=loss)
    again = trainer.train(LESSONS, killed, IDENTITY)
    assert again.num_resumed == 4
    assert (again.curve, again.looks, again.best_step) == (whole.curve, whole.looks, whole.best_step)


def test_it_ends_where_nothing_gets_better(make: Make, tmp_path: Path) -> None:
    """And the student is then as it was when it did best."""
    trainer = make(replace(OPTIONS, steps=40, learning_rate=0.5, eval_every=1, patience=2))
    before = trainer.look(0)
    found = trainer.train(LESSONS, tmp_path, IDENTITY)
    assert found.is_stopped and found.best_step == 0 and len(found.curve) == 2
    assert trainer.look(0) == before
    again = make(replace(OPTIONS, steps=40, learning_rate=0.5, eval_every=1, patience=2))
    assert again.train(LESSONS, tmp_path, IDENTITY).num_resumed == 2


def test_other_options_are_another_run(make: Make, tmp_path: Path) -> None:
    make().train(LESSONS, tmp_path, IDENTITY)
    with raises(ConflictError, "teacher", "tiny", "large"):
        make().train(LESSONS, tmp_path, {"teacher": "large"})
    with raises(ConflictError, "training.steps", 6, 7):
        make(replace(OPTIONS, steps=7)).train(LESSONS, tmp_path, IDENTITY)
    (tmp_path / "training.safetensors").write_bytes(b"half")
    with raises(CheckpointError, "training.safetensors"):
        make().train(LESSONS, tmp_path, IDENTITY)


def test_nan_ends_it_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    with raises(ConfigError, "nan"):
        make(damage=torch.nan).train(LESSONS, tmp_path, IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_in_parts_is_the_same_batch(make: Make) -> None:
    whole, parts = (make(replace(OPTIONS, part_tokens=size)).train_step(LESSONS[:3], 0) for size in (48, 16))
    assert parts.total_loss == pytest.approx(whole.total_loss, rel=1e-6)


def test_a_full_disk_leaves_what_was_there(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make(replace(OPTIONS, steps=2, patience=0))
    before.train(LESSONS, tmp_path, IDENTITY)
    content = (tmp_path / "training.safetensors").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("amalgam.base.files.NewFile.write", full)
    with raises(CheckpointError, str(tmp_path)):
        make(replace(OPTIONS, steps=2, patience=0, seed=1)).train(LESSONS, tmp_path / "other", IDENTITY)
    assert (tmp_path / "training.safetensors").read_bytes() == content


def test_lessons_come_in_an_order_of_their_own() -> None:
    first = [next(batch) for batch in [batches(LESSONS, 48, 0)] for _ in range(6)]
    again = [next(batch) for batch in [batches(LESSONS, 48, 0)] for _ in range(6)]
    assert first == again and first[:3] != first[3:]
    assert {one for batch in first[:3] for one in batch} == set(LESSONS)
    assert [len(part) for part in parts_of([lesson(0, 40), lesson(1, 4), lesson(2, 4)], 8)] == [1, 2]
    rows, labels = scored([Window("", 0, (5, 6, 7, 8), 0.0, first=2), Window("", 1, (9, 10), 0.0)])
    assert rows.tolist() == [1, 2, 4] and labels.tolist() == [7, 8, 10]


def test_the_rate_rises_and_falls() -> None:
    options = TrainingOptions(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [options.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and 0.1 <= rates[-1] < 0.11
