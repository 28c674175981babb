"""`amalgam summarize`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from amalgam.base.counting import counted
from amalgam.cli.files import read_text
from amalgam.cli.options import with_settings
from amalgam.cli.sampling import MinP, RepetitionPenalty, Seed, Temperature, TopK, TopP, chosen
from amalgam.config.settings import Settings
from amalgam.text.summary import CHUNK_TOKENS, OVERLAP_TOKENS, SUMMARY_TOKENS, check_sizes

if TYPE_CHECKING:
    from amalgam.composition.progress import Progress
    from amalgam.runtime.deployment import Deployment
    from amalgam.server.api.summaries import SummarizeAnswer, SummarizeBody

_MOST = 2**31 - 1  # as the server has it


@with_settings
def command(
    file: Annotated[Path, typer.Argument(help="Text in UTF-8, of any length; - reads stdin.")],
    settings: Settings,
    chunk_tokens: Annotated[int, typer.Option(max=_MOST, help="Tokens per chunk.")] = CHUNK_TOKENS,
    overlap_tokens: Annotated[int, typer.Option(help="Tokens that the next chunk repeats.")] = OVERLAP_TOKENS,
    max_summary_tokens: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Most tokens of each summary.")
    ] = SUMMARY_TOKENS,
    language: Annotated[
        Literal["auto", "en", "zh"],
        typer.Option(help="Language of the instructions to the model; auto: that of the text."),
    ] = "auto",
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, with chunks and figures.")] = False,
) -> None:
    """Summarize a long text without a server: first its chunks, then their summaries, until one is left."""
    check_sizes(chunk_tokens, overlap_tokens)
    text = read_text(file)  # before the imports, which take seconds

    from amalgam.cli.console import note, print_json, progress_bar, write
    from amalgam.runtime.opening import open_deployment
    from amalgam.server.api.summaries import SummarizeBody

    params = chosen(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    body = SummarizeBody(
        text=text,
        chunk_tokens=chunk_tokens,
        overlap_tokens=overlap_tokens,
        max_summary_tokens=max_summary_tokens,
        language=language,
        **{name: getattr(params, name) for name in params.given},
    )
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    try:
        with progress_bar("prompts") as progress:
            answer = asyncio.run(_run(deployment, settings, body, progress))
    finally:
        deployment.close()
    if as_json:
        print_json(answer.model_dump())
        return
    write(answer.summary.removesuffix("\n") + "\n")
    note(
        f"{counted(answer.document_tokens, 'token')} in {counted(len(answer.chunks), 'chunk')}, "
        f"merged in {counted(answer.merges, 'round')}, {answer.timings.total_seconds:.1f} s"
    )


async def _run(deployment: Deployment, settings: Settings, body: SummarizeBody, progress: Progress) -> SummarizeAnswer:
    from amalgam.server.local import LocalServer

    server = LocalServer(deployment, settings)
    await server.start()
    return await server.summarize(body, lambda done, known: progress("Summarizing", done, known))
