"""`amalgam fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amalgam.base.counting import counted
from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.tools.fit import Fit, FitReport, Hardware

NOTHING_FITS = 1


@with_settings(needs_model=False)
def command(
    settings: Settings,
    config_file: Path | None,
    model: Annotated[
        str | None, typer.Argument(metavar="FOLDER_OR_HUB_ID", help="The checkpoint; or give --config.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence. Default: inference.max_seq_length.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time. Default: inference.max_batch_size.")
    ] = None,
    min_speed: Annotated[
        float, typer.Option("--min-speed", min=0, help="Least tokens per second for one sequence.")
    ] = 0.0,
    measures: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time layers on this machine (takes seconds).")
    ] = True,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="24GB[@1008GB/s]|CARD",
            help="Ask about a card that is not here: its memory, how fast that is read, or a known card such as "
            "rtx-4090. Nothing is timed.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Recommend the precision, context and batch of a model for this machine, and estimate its speed."""
    from amalgam.cli.console import print_json, progress_bar
    from amalgam.planning.cards import parse_card
    from amalgam.tools.fit import Wanted, fit_model

    if model is not None and settings.model.base_path:
        raise ConfigError("Two models are given.", remedy="Give a folder, or --config or --model.")
    if model is not None:
        settings = settings.replace(model={**settings.model.model_dump(), "base_path": model})
    if not settings.model.base_path:
        raise ConfigError("No model is given.", remedy="Give its folder or hub id, or --config.")
    if min_speed and not measures:
        raise ConfigError("--min-speed is given with --no-measure.", remedy="Leave one of them out.")
    if gpu is not None and min_speed:
        raise ConfigError("--min-speed is given with --gpu.", remedy="A card that is not here cannot be timed.")
    inference = settings.inference
    wanted = Wanted(context or inference.max_seq_length, sequences or inference.max_batch_size, min_speed)
    card = None if gpu is None else parse_card(gpu, "--gpu")
    with progress_bar(unit="steps") as progress:
        report = fit_model(settings, wanted, measures=measures, config=config_file, progress=progress, card=card)
    if as_json:
        print_json(report.as_json())
    else:
        _show(report)
    return 0 if report.recommendation is not None else NOTHING_FITS


def _show(report: FitReport) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import note, print_table, say

    print_table((), _hardware_rows(report.hardware), "This machine")
    active = f", {report.num_active_parameters / 1e9:.2f} billion of them active for a token"
    is_sparse = report.num_active_parameters != report.num_parameters
    say(f"\n{report.model}: {report.num_parameters / 1e9:.2f} billion parameters{active if is_sparse else ''}.\n")
    rows = [
        (
            fit.candidate.name,
            f"{fit.candidate.bits_per_weight:.1f}",
            human_bytes(fit.candidate.weights_bytes),
            human_bytes(fit.total_bytes),
            _verdict(fit),
            f"{fit.sequences} × {fit.context:,}" if fit.fits else "–",
            _speed(fit),
            "to be made" if fit.candidate.command else "there",
        )
        for fit in report.fits
    ]
    columns = ("weights", "bits", "weights take", "in all", "fits", "sequences × tokens", "tok/s of one", "")
    print_table(columns, rows, "What could run here")
    for source, reason in report.left_out.items():
        note(f"{source} was left out: {reason}")
    if not report.has_tokenizer:
        note("The checkpoint has no tokenizer, so that the memory of one is not counted.")
    best = report.recommendation
    if best is None:
        least = max(report.fits, key=_spare)
        say(
            f"\nNothing fits: {least.candidate.name}, the nearest, lacks {human_bytes(-least.spare_bytes)} for one "
            f"sequence. Take a smaller model or a machine with more memory."
        )
        return
    say(f"\nTake {best.fit.candidate.name}, {best.fit.sequences} sequences of {best.fit.context:,} tokens:")
    for reason in best.reasons:
        say(f"  - {reason}")
    say("")
    for line in best.commands:
        say(f"    {line}")


def _verdict(fit: Fit) -> str:
    from amalgam.base.sizes import human_bytes

    if not fit.fits:
        return f"no, lacks {human_bytes(-fit.spare_bytes)}"
    if fit.far_experts:
        return f"with {fit.far_experts} experts ({human_bytes(fit.far_bytes)}) on the CPU"
    return f"yes, {human_bytes(fit.spare_bytes)} to spare"


def _speed(fit: Fit) -> str:
    """Timed here, or what bytes and a published bandwidth allow at most."""
    if fit.candidate.tokens_per_second is not None:
        return f"{fit.candidate.tokens_per_second:.1f}"
    return "–" if fit.at_most is None else f"at most {fit.at_most:,.0f} by bytes, not measured"


def _spare(fit: Fit) -> int:
    return fit.spare_bytes


def _hardware_rows(hardware: Hardware) -> list[tuple[str, str]]:
    from amalgam.base.sizes import human_bytes

    machine = hardware.machine
    cores = f"{machine.cores} on {counted(machine.nodes, 'memory node')}"
    if machine.quota is not None:
        cores += f", time for {machine.quota:g} of them"
    memory = f"{human_bytes(machine.memory_bytes)}, {human_bytes(machine.available_bytes)} available"
    if machine.memory_limit is not None:
        memory += " (the container's limit)"
    amx = "AMX" if "amx_tile" in machine.instruction_sets else "no AMX"
    rows = [
        ("processor", machine.processor),
        ("cores", cores),
        ("instruction sets", f"{', '.join(machine.instruction_sets) or 'none that kernels are written for'} ({amx})"),
        ("memory", memory),
    ]
    rows += [
        ("GPU", f"{gpu.name}, {human_bytes(gpu.memory_bytes)}, {human_bytes(gpu.available_bytes)} available")
        for gpu in hardware.gpus
    ] or [("GPU", "none that PyTorch sees")]
    return [*rows, ("runs on", f"{hardware.device}, may take {human_bytes(hardware.room_bytes)}")]
