"""`amalgam generate --input FILE --output FILE`: many prompts, in files."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from amalgam.config.settings import Settings
from amalgam.engine.params import MAX_SEED, SamplingParams

if TYPE_CHECKING:
    from amalgam.composition.progress import Progress
    from amalgam.runtime.deployment import Deployment
    from amalgam.tools.batch import Defaults, InputFile, Totals
    from amalgam.tools.journal import Journal

INTERRUPTED = 130
# Settings of the server that change answers.
_SHAPING = {"chat_template", "embedding_pooling", "reasoning_parser", "served_model_names", "tool_parser"}
_MAX_NEW_TOKENS = 128  # of a prompt, where neither the user nor the model says


def answer_lines(settings: Settings, source: Path, output: Path, params: SamplingParams, *, as_json: bool) -> int:
    """Answer what an earlier run has not, and say what was done."""
    totals = write_answers(settings, source, output, params)
    if totals is None:
        return INTERRUPTED
    _show(totals, output, as_json=as_json)
    return 0


def write_answers(settings: Settings, source: Path, output: Path, params: SamplingParams) -> Totals | None:
    """Answer what an earlier run has not, and write the output once everything is there.

    Returns:
        None: it was interrupted, and said so.
    """
    from amalgam.cli.console import note, progress_bar
    from amalgam.runtime.opening import open_deployment
    from amalgam.tools.batch import Defaults, InputFile, Totals
    from amalgam.tools.journal import Journal, partial_of

    lines = InputFile.read(source, settings.server.max_body_bytes)
    totals = Totals(lines.num_lines)
    given = {name: getattr(params, name) for name in params.given}
    seed = given.pop("seed", None)
    identity = {
        "input": lines.sha256,
        "sampling": given | ({} if seed is None else {"seed": seed}),
        "model": settings.model.model_dump(mode="json"),
        "inference": settings.inference.model_dump(mode="json", exclude={"max_batch_size"}),
        "engine": settings.engine.model_dump(mode="json", include={"kv_dtype"}),
        "server": settings.server.model_dump(mode="json", include=_SHAPING),
    }
    fresh = {"seed": secrets.randbelow(MAX_SEED) if seed is None else seed, "created": int(time.time())}
    with Journal.open(output, _plain(identity), fresh, totals.count) as journal:
        totals.num_resumed = len(journal.done)
        if totals.num_resumed:
            note(f"{totals.num_resumed} of {totals.num_lines} lines are answered already.")
        if totals.num_resumed < totals.num_lines:
            with progress_bar() as progress:
                deployment = open_deployment(settings, progress)
            limit = None if "max_new_tokens" in deployment.defaults.from_model else _MAX_NEW_TOKENS
            defaults = Defaults(given, given.pop("max_new_tokens", None), limit)
            try:
                journal.bind("weights", deployment.version.fingerprint)
                with progress_bar("lines") as progress:
                    asyncio.run(_run(deployment, settings, lines, journal, totals, defaults, progress))
            except KeyboardInterrupt:
                num_kept = len(journal.done)
                note(f"Interrupted. {num_kept} of {totals.num_lines} lines are answered and kept in "
                     f"{partial_of(output)}; the same command goes on.")  # fmt: skip
                return None
            finally:
                deployment.close()
        journal.finish(totals.num_lines)
    return totals


async def _run(
    deployment: Deployment,
    settings: Settings,
    lines: InputFile,
    journal: Journal,
    totals: Totals,
    defaults: Defaults,
    progress: Progress,
) -> None:
    from amalgam.server.local import LocalServer
    from amalgam.tools.batch import answer_file, ask_until_failure

    server = LocalServer(deployment, settings)
    await server.start()
    ask = ask_until_failure(server.post, lambda: server.failure)
    await answer_file(lines, journal, totals, ask, defaults, server.max_in_flight, progress)


def _plain(identity: Mapping[str, object]) -> dict[str, object]:
    """As it is once it has been written and read."""
    import orjson

    plain: dict[str, object] = orjson.loads(orjson.dumps(identity))
    return plain


def _show(totals: Totals, output: Path, *, as_json: bool) -> None:
    from amalgam.cli.console import print_json, print_table

    if as_json:
        print_json({"output": str(output), **asdict(totals)})
        return
    columns = ("lines", "answered", "errors", "resumed", "prompt tokens", "new tokens")
    figures = (
        totals.num_lines, totals.num_answered, totals.num_errors, totals.num_resumed, totals.num_prompt_tokens,
        totals.num_new_tokens,
    )  # fmt: skip
    print_table(columns, [[str(figure) for figure in figures]], str(output))
