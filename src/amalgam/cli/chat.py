"""`amalgam chat`."""

from __future__ import annotations

import queue
from typing import Annotated

import typer

from amalgam.cli.generate import MaxNewTokens, RepetitionPenalty, Seed, Temperature, TopK, TopP
from amalgam.cli.options import with_settings
from amalgam.config import Settings
from amalgam.engine.request import RequestOutput, SamplingParams


@with_settings
def command(
    settings: Settings,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 50,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = 1.0,
) -> None:
    """Talk to the model in the terminal. /reset forgets the conversation, /quit or Ctrl-D ends it."""
    from amalgam.cli.console import err, progress_bar
    from amalgam.llm import open_deployment

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        continues_prompt=False,
    )
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    err.print(f"{deployment.model_name}: /reset forgets the conversation, /quit ends it.", style="dim")
    try:
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                break
            if line == "/quit":
                break
            if line == "/reset":
                messages = list(opening)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
            request_id = deployment.engine.submit(deployment.tokenizer.encode_chat(messages), params, outputs.put)
            answer = ""
            try:
                while True:
                    output = outputs.get()
                    if output.error is not None:
                        raise output.error
                    typer.echo(output.text, nl=False)
                    answer += output.text
                    if output.is_finished:
                        break
            except KeyboardInterrupt:  # ends the answer, not the conversation
                deployment.engine.cancel(request_id)
            typer.echo()
            messages.append({"role": "assistant", "content": answer})
    finally:
        deployment.close()
