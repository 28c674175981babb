"""`amalgam generate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from amalgam.cli.options import with_settings
from amalgam.config import Settings
from amalgam.engine.request import SamplingParams

MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Smallest set of tokens with this probability.")]
TopK = Annotated[int, typer.Option(help="This many most probable tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens seen before become less probable.")]


@with_settings
def command(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts, answered together.")],
    settings: Settings,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 50,
    seed: Seed = None,
    stop: Annotated[list[str], typer.Option(help="Stop before this text. Repeatable.")] = [],  # noqa: B006
    repetition_penalty: RepetitionPenalty = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer prompts without a server."""
    from amalgam.cli.console import err, out, print_json, progress_bar
    from amalgam.llm import open_deployment

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop),
        repetition_penalty=repetition_penalty,
    )
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    try:
        token_ids = [deployment.tokenizer.encode(text) for text in prompt]
        answers = deployment.engine.generate(token_ids, params)
    finally:
        deployment.close()
    failed = next((answer.error for answer in answers if answer.error is not None), None)
    if failed is not None:
        raise failed
    if as_json:
        print_json(
            [
                {
                    "prompt": text,
                    "generated_text": answer.text,
                    "finish_reason": answer.finish_reason.value,
                    "usage": asdict(answer.usage),
                }
                for text, answer in zip(prompt, answers, strict=True)
            ]
        )
        return
    for text, answer in zip(prompt, answers, strict=True):
        out.print(text, style="dim", end="", markup=False, highlight=False)
        out.print(answer.text, markup=False, highlight=False)
        speed = answer.usage.num_new_tokens / max(answer.usage.total_seconds, 1e-9)
        err.print(
            f"{answer.usage.num_prompt_tokens} + {answer.usage.num_new_tokens} tokens, {speed:.1f} tokens/s, "
            f"ended by {answer.finish_reason.value}",
            style="dim",
        )
