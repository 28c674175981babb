"""`amalgam generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from amalgam.cli.files import STDIN, read_text
from amalgam.cli.options import with_settings
from amalgam.cli.sampling import (
    FrequencyPenalty,
    JsonSchema,
    MaxNewTokens,
    MinP,
    MinTokens,
    PresencePenalty,
    Regex,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    chosen,
    completed,
    grammar_of,
)
from amalgam.config.settings import Settings
from amalgam.engine.request import FinishReason, RequestOutput
from amalgam.errors import RequestError

_INTERRUPTED = 130
_MAX_NEW_TOKENS = 128  # where neither the user nor the model says


@with_settings
def command(
    settings: Settings,
    prompt: Annotated[
        list[str], typer.Argument(help="One or more prompts, answered together; - reads one from stdin.")
    ] = [],  # noqa: B006
    input_file: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Answer each line of this file: JSONL of prompts, or of OpenAI requests."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answers to --input here, a line for each.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = [],  # noqa: B006
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    min_tokens: MinTokens = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Answer prompts without a server. The answer is printed as it comes; Ctrl-C keeps what has come.

    Several answers are printed in the order of their prompts, each below a line that repeats its prompt. With --input
    and --output the prompts are lines of a file; a run that was interrupted goes on when the command is given again.
    """
    from amalgam.cli.console import note, print_json, progress_bar
    from amalgam.runtime.opening import open_deployment
    from amalgam.text.grammar import compile_grammar

    params = chosen(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop) or None,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
    )
    grammar = grammar_of(json_schema, regex)
    if input_file is not None or output_file is not None:
        from amalgam.cli.batch import answer_lines

        if input_file is None or output_file is None:
            given, missing = ("--output", "--input") if input_file is None else ("--input", "--output")
            raise RequestError(f"{given} is given without {missing}.", remedy="Give both.")
        if prompt or grammar is not None:
            raise RequestError(
                f"--input is given with {'a prompt' if prompt else '--json-schema or --regex'}.",
                remedy="Leave that out: the lines of the file have the prompts, and may have a response_format.",
            )
        return answer_lines(settings, input_file, output_file, params, as_json=as_json)
    if not prompt:
        raise RequestError("There is no prompt.", remedy="Give one, or --input and --output.")
    prompt = _with_stdin(prompt)
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    answers = _Answers(prompt, is_shown=not as_json)
    is_interrupted = False
    try:
        engine = deployment.engine
        constraint = None if grammar is None else compile_grammar(deployment.tokenizer, grammar)
        token_ids = [deployment.tokenizer.encode(text, engine.max_prompt_tokens) for text in prompt]
        completed_params = completed(params, deployment.defaults, _MAX_NEW_TOKENS)
        engine.generate(token_ids, completed_params, watch=answers.take, constraint=constraint)
    except KeyboardInterrupt:
        is_interrupted = True
        answers.close()
    finally:
        deployment.close()
    if as_json:
        print_json(answers.as_json())
    if answers.error is not None:
        raise answers.error
    if is_interrupted:
        note("Interrupted.")
        return _INTERRUPTED
    return 0


def _with_stdin(prompts: list[str]) -> list[str]:
    """The prompts, with what standard input has in place of `-`; the end of its last line is no part of it."""
    num_read = prompts.count(str(STDIN))
    if num_read > 1:
        raise RequestError(f"{num_read} prompts are -.", remedy="Standard input is read once.")
    return [read_text(STDIN).removesuffix("\n") if text == str(STDIN) else text for text in prompts]


class _Answers:
    """Answers as they come, all at once, shown one after the other."""

    def __init__(self, prompts: Sequence[str], *, is_shown: bool) -> None:
        self._prompts = prompts
        self._texts = ["" for _ in prompts]
        self._last: list[RequestOutput | None] = [None for _ in prompts]
        self._is_shown = is_shown
        self._current = 0  # whose answer is being shown
        self._num_shown = 0  # characters of it
        self._has_begun = False

    @property
    def error(self) -> Exception | None:
        """Of the first that failed."""
        return next((last.error for last in self._last if last is not None and last.error is not None), None)

    def take(self, index: int, output: RequestOutput) -> None:
        self._texts[index] += output.text
        if output.is_finished:
            self._last[index] = output
        if not self._is_shown:
            return
        while self._current < len(self._prompts):
            self._show()
            if self._last[self._current] is None:
                break
            self._end()

    def close(self) -> None:
        """Nothing more comes: show what there is."""
        while self._is_shown and self._current < len(self._prompts):
            if self._texts[self._current]:
                self._show()
            self._end()

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "generated_text": text,
                "finish_reason": (last.finish_reason if last and last.finish_reason else FinishReason.CANCELLED).value,
                "usage": asdict(last.usage) if last and last.usage else None,
                **({"error": str(last.error)} if last and last.error else {}),
            }
            for prompt, text, last in zip(self._prompts, self._texts, self._last, strict=True)
        ]

    def _show(self) -> None:
        from amalgam.base.escaping import one_line
        from amalgam.cli.console import say, write

        text = self._texts[self._current]
        if not self._has_begun:
            self._has_begun = True
            if len(self._prompts) > 1:
                gap = "\n" if self._current else ""  # as `head` and `tail` separate files
                say(f"{gap}==> {one_line(self._prompts[self._current])} <==")
        if len(text) > self._num_shown:
            write(text[self._num_shown :])
            self._num_shown = len(text)

    def _end(self) -> None:
        from amalgam.cli.console import note, write

        if self._num_shown and not self._texts[self._current].endswith("\n"):
            write("\n")
        last = self._last[self._current]
        if last is not None and last.usage is not None and last.finish_reason is not None:
            speed = last.usage.num_new_tokens / max(last.usage.total_seconds, 1e-9)
            note(
                f"{last.usage.num_prompt_tokens} + {last.usage.num_new_tokens} tokens, {speed:.1f} tokens/s, "
                f"ended by {last.finish_reason.value}"
            )
        self._current += 1
        self._num_shown = 0
        self._has_begun = False
