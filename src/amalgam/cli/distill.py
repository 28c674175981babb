"""`amalgam distill`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.base.counting import counted
from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.tools.distill import DistillReport
    from amalgam.training.trainer import Look

_MAX_NAMED = 20
_PLAN_FILES = (".yaml", ".yml")
_MIXING = {"--source": "sources", "--map": "rules"}


@with_settings(needs_model=False, shown=("inference.device_map", "inference.dtype"))
def command(
    settings: Settings,
    origins: Mapping[str, str],
    folder: Annotated[
        Path, typer.Argument(help="Folder to write; must not exist. Repeat the command to resume an interrupted run.")
    ],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="PLAN|MODEL", help="The teacher. Default: the student with every weight from base."),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN|MODEL",
            help="Who learns: a configuration (YAML), a model, or a folder with nothing but a config.json. Default: "
            "what --config or --model say, or with --width or --layers a smaller model of the teacher's kind.",
        ),
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Make a student with this share of the teacher's channels, heads and inner sizes."
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Make a student with this many of the teacher's layers.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Weights of a student that is made: slices of the teacher's (slices, the default), or random."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="[NAME=]FILE", help="Training text: .txt, .jsonl or .json. Repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts (JSONL as for `generate --input`) whose answers by the teacher are the training text."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="File that keeps the teacher's answers between runs. Default: beside the folder."),
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(
            "--heldout",
            metavar="[NAME=]FILE",
            help="Held-out text: decides when to stop, shows the gain. Default: a fifth of the text. Repeatable.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens computed as one sequence.")] = 256,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of all texts, divided equally among the files.")
    ] = None,
    heldout_tokens: Annotated[
        int, typer.Option(min=2, help="Most held-out tokens; all are read at every evaluation.")
    ] = 8192,
    temperature: Annotated[
        float | None, typer.Option(help="Softens both distributions of the divergence.  [default: 1]")
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Weight of the divergence in the loss; the rest is cross-entropy on the text."
        ),
    ] = 1.0,
    kl: Annotated[
        str | None,
        typer.Option(help="forward: KL(teacher ‖ student), the default; reverse: KL(student ‖ teacher)."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="What learns, with commas: scales, codes (rounded anew beside their scales), norms, biases, routers, "
            "wide (other floating weights). Default: scales,norms,biases,routers of a quantized student, else all but "
            "codes and scales.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Train codes and wide by low-rank updates (LoRA), merged at the end.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Most steps.")] = 200,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Tokens per step, about.")] = 2048,
    part_tokens: Annotated[int, typer.Option(min=2, help="Tokens in memory at once.")] = 2048,
    lr: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            help="Largest learning rate, as a share of a weight's values. Default: 0.001; 0.02 where matrices learn.",
        ),
    ] = None,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations on held-out text.")] = 20,
    patience: Annotated[
        int,
        typer.Option(min=0, help="Stop after this many evaluations without an improvement. 0: never before --steps."),
    ] = 5,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints of the run.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of texts and of all random draws.")] = 0,
    curve: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Draw losses and divergence by steps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Train a model on another one: recover the quality of a low-precision plan, or make a smaller student."""
    from amalgam.base.files import check_writable
    from amalgam.cli.console import note, print_json, progress_bar, resumable
    from amalgam.tools.distill import DistillOptions, check_before_answers, distill, teacher_settings, write_curve
    from amalgam.tools.distill_texts import TextsToLearn
    from amalgam.tools.initial_student import Beginning
    from amalgam.training.initial import Shape
    from amalgam.training.losses import DistillationLoss
    from amalgam.training.trainer import TrainingOptions

    if alpha == 0:
        given = {"--temperature": temperature is not None, "--kl": kl is not None}
        refuse_unused(given, "--alpha above 0", "The text alone is learned from: leave it out.")
    folder = folder.expanduser()
    if curve is not None:
        curve = curve.expanduser()
        check_writable(curve)
    if answers is not None:
        answers = answers.expanduser()
    elif prompts is not None:
        answers = folder.absolute().with_name(f"{folder.name}.answers.jsonl")
    shape = None if width is None and layers is None else Shape(1.0 if width is None else width, layers)
    options = DistillOptions(
        texts=TextsToLearn(text or [], answers, heldout or [], window, tokens, heldout_tokens, seed),
        loss=DistillationLoss(1.0 if temperature is None else temperature, alpha, kl or "forward"),  # type: ignore[arg-type]
        training=TrainingOptions(
            steps=steps, batch_tokens=batch_tokens, part_tokens=part_tokens, eval_every=eval_every,
            patience=patience, save_every=save_every, seed=seed,
        ),
        kinds=None if train is None else frozenset(part.strip() for part in train.split(",")),  # type: ignore[misc]
        rank=rank,
        learning_rate=lr,
        beginning=Beginning(shape, init, seed),  # type: ignore[arg-type]
    )  # fmt: skip
    if student is not None and settings.model.base_path:
        raise ConfigError("--student is given beside --config or --model.", remedy="Give one of them.")
    if not settings.model.base_path:
        given = {flag: origins.get(f"model.mixed_precision.{key}") == "flag" for flag, key in _MIXING.items()}
        refuse_unused(given, "--config or --model", "Name the student's base with --model, or write them into a plan.")
    flags = {key: reduce(getattr, key.split("."), settings) for key, origin in origins.items() if origin == "flag"}
    flags = {key: value for key, value in flags.items() if not key.startswith("model.")}
    pupil = _plan(student, settings, flags) if student is not None else settings if settings.model.base_path else None
    master = None if teacher is None else _plan(teacher, settings, flags)
    if prompts is not None and answers is not None and not answers.exists():
        check_before_answers(master, pupil, folder, options)
        code = _let_answer(teacher_settings(master, pupil), prompts, answers, seed)
        if code:
            return code
    with resumable(), progress_bar("steps") as progress:
        report = distill(master, pupil, folder, options, on_look=lambda look: note(_look_line(look)), progress=progress)
    if curve is not None:
        write_curve(report, curve)
    if as_json:
        print_json(report.as_json())
    else:
        _show(report)
    return 0


def _plan(name: str, settings: Settings, flags: Mapping[str, Any]) -> Settings:
    """A configuration's settings, which flags overrule, or those of this call with another model."""
    if not name.endswith(_PLAN_FILES):
        return settings.replace(model={"base_path": name})
    from amalgam.config.reading import load_settings

    return load_settings(name, flags)


def _let_answer(teacher: Settings, prompts: Path, answers: Path, seed: int) -> int:
    """Let the teacher write what is learned from."""
    from amalgam.cli.batch import INTERRUPTED, write_answers
    from amalgam.engine.params import SamplingParams

    totals = write_answers(teacher, prompts.expanduser(), answers, SamplingParams(seed=seed))
    return 0 if totals is not None else INTERRUPTED


def _look_line(look: Look) -> str:
    return f"step {look.step}: KL divergence {look.divergence:.5f}, loss {look.loss:.4f} on held-out text"


def _show(report: DistillReport) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import interval, note, print_table, say

    outcome = report.outcome
    rows: list[tuple[str, ...]] = [
        (
            name,
            human_bytes(nbytes),
            interval(quality.perplexity, "{:.2f}"),
            interval(quality.divergence, "{:.5f}"),
            interval(quality.agreement, "{:.2%}"),
        )
        for name, nbytes, quality in (
            ("before", report.before_bytes, report.before),
            ("after", report.after_bytes, report.after),
        )
    ]
    rows.append(("teacher", "", interval(report.teacher_quality.perplexity, "{:.2f}"), "", ""))
    columns = ("held out", "weights", "perplexity", "KL divergence", "top-1")
    print_table(columns, rows, f"{report.student} learned from {report.teacher}")
    ending = ", where held-out text found nothing better" if outcome.is_stopped else ""
    change = interval(report.difference, "{:+.1%}")
    if report.difference is None:
        change = f"0 before, {interval(report.after.divergence, '{:.5f}')} after,"
    say(
        f"Divergence {change} in {counted(len(outcome.curve), 'step')}{ending} "
        f"({outcome.num_tokens:,} tokens, {outcome.seconds:.0f} s); best behind step {outcome.best_step}. Trained: "
        f"{', '.join(report.trained)}, {report.num_parameters:,} numbers. Wrote {report.folder}."
    )
    if report.left_out:
        more = f" and {len(report.left_out) - _MAX_NAMED} more" if len(report.left_out) > _MAX_NAMED else ""
        say(f"Not carried over: {', '.join(report.left_out[:_MAX_NAMED])}{more}")
    for remark in report.remarks:
        note(remark)
