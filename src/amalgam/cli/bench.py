"""`amalgam bench`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.settings import Settings


@with_settings(needs_model=False)
def command(
    settings: Settings,
    shape: Annotated[
        str | None, typer.Option(help="Time this shape with random weights instead of a model: S.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Format of the shape's weights: bf16 (the default), fp8, int8, int4, … or mixed.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt lengths.")] = "128,512",
    batches: Annotated[str, typer.Option(help="Numbers of sequences that decode together.")] = "1,8,16",
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each sequence decodes.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and no table.")] = False,
) -> None:
    """Measure load time, memory, prompt and decoding speed. The last line is one JSON object.

    `amalgam bench serve` measures a running server."""
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import print_json, print_table, progress_bar
    from amalgam.errors import ConfigError
    from amalgam.runtime.opening import open_deployment
    from amalgam.tools import bench

    if shape is None:
        refuse_unused({"--weights": weights}, "--shape", "Add --shape S.")
    chosen: dict[str, Any] = {
        "prompts": numbers_of("--prompts", prompts),
        "batches": numbers_of("--batches", batches),
        "num_tokens": num_tokens,
        "repeats": repeats,
    }
    with progress_bar() as progress:
        if shape is not None:
            report = bench.bench_shape(shape, weights or "bf16", settings, progress=progress, **chosen)
        elif settings.model.base_path:
            deployment = open_deployment(settings, progress)
            try:
                report = bench.bench_model(deployment, **chosen)
            finally:
                deployment.close()
        else:
            raise ConfigError("Nothing to measure.", remedy="Give --config FILE, --model FOLDER or --shape S.")
    document = {"command": ["amalgam", *sys.argv[1:]], "commit": bench.commit(), **report.as_json()}
    if as_json:
        print_json(document)
        return
    sizes = ", ".join(f"{name} {human_bytes(size)}" for name, size in report.weights.items())
    rows = [
        (item.name, f"{item.value:.2f}", item.unit, "  ".join(f"{value:.1f}" for value in item.repeats))
        for item in report.measurements
    ]
    print_table(("measurement", "median", "unit", "all rounds"), rows, f"{report.model}: {sizes}")
    print_json(document, is_indented=False)


def numbers_of(flag: str, text: str) -> list[int]:
    from amalgam.errors import ConfigError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and 0 < int(part) <= 65536 for part in parts):
        raise ConfigError(f"{flag} is {text!r}.", remedy="Expected numbers separated by commas, for instance 1,8,16.")
    return [int(part) for part in parts]
