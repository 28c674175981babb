"""`amalgam bench cache`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amalgam.cli.bench import numbers_of
from amalgam.cli.options import refuse_unused, with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError

if TYPE_CHECKING:
    from amalgam.composition.progress import Progress
    from amalgam.engine.core import Engine
    from amalgam.models.spec import ModelSpec
    from amalgam.tools.bench_cache import CacheReport


@with_settings(needs_model=False)
def command(
    settings: Settings,
    shape: Annotated[
        str | None, typer.Option(help="Time this shape with random weights instead of a model: S.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Format of the shape's weights, as for `amalgam bench` [bf16].")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt lengths.")] = "16,256",
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are generated.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Draw the ratios by length.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and no table.")] = False,
) -> None:
    """Measure what the KV cache saves, compared with computing the whole text again at every step."""
    from amalgam.base.files import check_writable, replace_file, writing
    from amalgam.cli.console import note, print_json, print_table, progress_bar, say
    from amalgam.tools import bench
    from amalgam.tools.bench_cache import cache_html, measure

    lengths = numbers_of("--prompts", prompts)
    if shape is None:
        refuse_unused({"--weights": weights}, "--shape", "Add --shape S.")
    if out is not None:
        check_writable(out)
    # Blocks that a former step has left would be a cache after all, and steps of several tokens nothing to compare.
    settings = settings.replace(engine=settings.engine.model_dump() | {"prefix_cache": False}, speculation={})
    with ExitStack() as stack:
        with progress_bar() as progress:
            opening = _engine(settings, shape, weights or "bf16", max(lengths) + num_tokens, progress)
            name, engine, spec = stack.enter_context(opening)
        with progress_bar("tokens") as progress:
            report = measure(engine, spec, lengths, num_tokens, repeats, progress)
    document = {
        "command": ["amalgam", *sys.argv[1:]],
        "commit": bench.commit(),
        "model": name,
        "hardware": bench.hardware(),
        **report.as_json(),
    }
    if as_json:
        print_json(document)
    else:
        columns = ("prompt", "new", "with, s", "without, s", "ratio", "tokens with", "tokens without", "their ratio")
        print_table(columns, list(_rows(report)), f"{name}: with and without the KV cache")
        for step in report.steps:
            say(
                f"A step over a text of {step.num_tokens} tokens took {step.text_seconds * 1e3:.2f} ms, over one token "
                f"{step.token_seconds * 1e3:.2f} ms: {step.ratio:.1f} times as long."
            )
        say(f"{report.num_equal} of {report.num_compared} tokens came out alike both ways.")
        print_json(document, is_indented=False)
    if out is not None:
        with writing(out):
            replace_file(out, cache_html(report, name))
        note(f"Wrote {out}.")


@contextmanager
def _engine(
    settings: Settings, shape: str | None, weights: str, num_tokens: int, progress: Progress
) -> Iterator[tuple[str, Engine, ModelSpec]]:
    """What is measured.

    Args:
        num_tokens: of the longest text.

    Raises:
        ConfigError: there is neither a shape nor a model, or the text is longer than the model's.
    """
    from amalgam.runtime.opening import open_deployment
    from amalgam.tools import bench

    if shape is not None:
        with bench.shape_engine(shape, weights, settings, max_tokens=num_tokens, max_batch=1, progress=progress) as (
            engine,
            spec,
        ):
            yield f"shape {shape}, {weights}", engine, spec
        return
    if not settings.model.base_path:
        raise ConfigError("Nothing to measure.", remedy="Give --config FILE, --model FOLDER or --shape S.")
    if num_tokens > settings.inference.max_seq_length:
        raise ConfigError(
            f"Prompt and new tokens come to {num_tokens}; inference.max_seq_length is "
            f"{settings.inference.max_seq_length}.",
            remedy="Lower --prompts or --num-tokens, or raise inference.max_seq_length.",
        )
    deployment = open_deployment(settings, progress)
    try:
        yield deployment.model_name, deployment.engine, deployment.spec
    finally:
        deployment.close()


def _rows(report: CacheReport) -> Iterator[tuple[str, ...]]:
    for row in report.rows:
        yield (
            str(row.num_prompt_tokens),
            str(row.num_new_tokens),
            f"{row.with_seconds:.3f}",
            f"{row.without_seconds:.3f}",
            f"{row.ratio:.1f}",
            str(row.tokens_with),
            str(row.tokens_without),
            f"{row.token_ratio:.1f}",
        )
