"""`amalgam estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings


@with_settings
def command(
    settings: Settings,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence. Default: max_seq_length.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time. Default: max_batch_size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say how much memory a model will need, and whether it fits this machine. Reads headers only."""
    from amalgam.cli.console import human_bytes, print_json, print_table, progress_bar, say
    from amalgam.runtime.derive import ensure_derived
    from amalgam.tools.estimate import estimate

    with progress_bar() as progress:
        ensure_derived(settings, progress)
    result = estimate(settings, length, batch)
    if as_json:
        print_json(result.as_json())
        return
    rows = [(f"weights in {name}", human_bytes(size)) for name, size in result.weights.items()]
    if result.mapped_bytes:
        rows.append(("less what the packed cache maps", f"-{human_bytes(result.mapped_bytes)}"))
    rows += [
        (f"KV cache ({human_bytes(result.kv_bytes_per_token)} per token)", human_bytes(result.kv_bytes)),
        *([("recurrent states", human_bytes(result.state_bytes))] if result.state_bytes else []),
        *([("draft that guesses tokens", human_bytes(result.draft_bytes))] if result.draft_bytes else []),
        ("workspace of a step", human_bytes(result.workspace_bytes)),
        ("the program itself", human_bytes(result.process_bytes)),
        ("all", human_bytes(result.total_bytes)),
        ("available now", human_bytes(result.available_bytes)),
    ]
    title = f"{result.batch_size} sequences of {result.seq_length} tokens"
    print_table(("memory for", "bytes"), rows, title, num_totals=2)
    verdict = "fits" if result.fits else "does NOT fit"
    say(f"It {verdict}. Beside the weights there is room for {result.max_tokens_that_fit:,} tokens of context.\n")
    uniform = [
        (row.format, human_bytes(row.weights_bytes), human_bytes(row.total_bytes), "yes" if row.fits else "no")
        for row in result.uniform
    ]
    print_table(("all linear weights in", "weights", "all", "fits"), uniform, "The same model in one precision")
