"""`amalgam chat`."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.cli.sampling import (
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    changed,
    chosen,
    completed,
    described,
)
from amalgam.config.settings import Settings, state_folder
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.errors import AmalgamError, RequestError, UnavailableError

if TYPE_CHECKING:
    from amalgam.cli.chat_input import Input
    from amalgam.runtime.deployment import Deployment

_HELP = """\
/help             this list
/reset            forget the conversation
/set              show how answers are sampled
/set NAME VALUE   change it; none takes back a seed or a stop
/quit             end, as Ctrl-D does

Enter sends. Alt-Enter, or a backslash before Enter, begins a new line, and a
paste keeps its lines. A message that begins with / is sent as //…
Ctrl-C ends an answer, and clears what is typed."""
_ENDS = ("/quit", "/exit")
_CANCEL_SECONDS = 5.0
_MAX_NEW_TOKENS = 512


@with_settings
def command(
    settings: Settings,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    history: Annotated[bool, typer.Option(help="Keep what is typed for the next time.")] = True,
) -> None:
    """Talk to the model in the terminal. /help lists the commands, Ctrl-D ends it."""
    from amalgam.cli.chat_input import open_input
    from amalgam.cli.console import note, progress_bar
    from amalgam.runtime.opening import open_deployment

    params = chosen(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        continues_prompt=False,
    )
    with progress_bar() as progress:
        deployment = open_deployment(settings, progress)
    try:
        if not deployment.tokenizer.has_chat_template:
            raise RequestError(
                f"{deployment.model_name} has no chat template.", remedy="Use `amalgam generate`, which needs none."
            )
        lines = open_input(state_folder() / "chat_history" if history else None)
        note(f"{deployment.model_name}: /help lists the commands, Ctrl-D ends the chat.")
        _Chat(deployment, completed(params, deployment.defaults, _MAX_NEW_TOKENS), system).run(lines)
    finally:
        deployment.close()


class _Chat:
    """A conversation, and the commands that change it."""

    def __init__(self, deployment: Deployment, params: SamplingParams, system: str) -> None:
        self._deployment = deployment
        self._params = params
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self, lines: Input) -> None:
        """Until the input ends. A mistake costs its message, and not the conversation.

        Raises:
            UnavailableError: the engine answers no more.
        """
        from amalgam.cli.console import note

        was_interrupted = False
        while True:
            try:
                text = lines.read()
                was_interrupted = False
                if text is None or text.strip() in _ENDS:
                    return
                self._take(text)
            except KeyboardInterrupt:
                if not lines.is_interactive:
                    raise
                if was_interrupted:
                    return
                was_interrupted = True
                note("Ctrl-C once more, or Ctrl-D, ends the chat.")
            except UnavailableError:
                raise
            except AmalgamError as error:
                note(f"Error: {error}")

    def _take(self, text: str) -> None:
        """One message or command."""
        from amalgam.cli.console import note

        name, _, rest = text.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/") or name.startswith("//"):
            self._answer(text.strip().removeprefix("/") if name.startswith("//") else text.strip())
        elif name == "/help":
            note(_HELP)
        elif name == "/reset":
            self._messages = list(self._opening)
            note("The conversation is forgotten.")
        elif name == "/set":
            self._set(rest.strip())
        else:
            raise RequestError(f"There is no command {name!r}.", remedy="/help lists them; // begins a message with /.")

    def _set(self, text: str) -> None:
        from amalgam.cli.console import note

        name, _, value = text.replace("=", " ", 1).partition(" ")
        if value.strip():
            self._params = changed(self._params, name, value.strip())
        values = described(self._params)
        name = name.replace("-", "_")
        if not name:
            note("\n".join(f"{key} = {value}" for key, value in values.items()))
        elif name in values:
            note(f"{name} = {values[name]}")
        else:
            changed(self._params, name, "")  # says which there are

    def _answer(self, text: str) -> None:
        from amalgam.cli.console import note, write

        messages = [*self._messages, {"role": "user", "content": text}]
        parts: list[str] = []

        def show(piece: str) -> None:
            parts.append(piece)
            write(piece)

        started = time.monotonic()
        last = _stream(self._deployment, messages, self._params, show)
        if parts and not parts[-1].endswith("\n"):
            write("\n")
        if last is not None and last.error is not None:
            raise last.error
        answer = "".join(parts)
        if answer:  # nothing is remembered of what was interrupted before it began
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        if last is None or last.usage is None or last.finish_reason is None:
            note(f"Interrupted after {time.monotonic() - started:.1f} s.")
            return
        usage = last.usage
        speed = usage.num_new_tokens / max(usage.total_seconds, 1e-9)
        end = {"length": "cut at max_new_tokens", "cancelled": "interrupted"}.get(last.finish_reason.value, "")
        figures = f"{usage.num_prompt_tokens} + {usage.num_new_tokens} tokens, {speed:.1f} tokens/s"
        note(f"[{figures}{', ' * bool(end)}{end}]")


def _stream(deployment: Deployment, messages: Any, params: SamplingParams, show: Any) -> RequestOutput | None:
    """Answer a conversation; Ctrl-C ends the answer. The last output, or None if it was interrupted too early."""
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    request_id: int | None = None
    try:
        token_ids = deployment.tokenizer.encode_chat(messages, deployment.engine.max_prompt_tokens)
        request_id = deployment.engine.submit(token_ids, params, outputs.put)
        while True:
            output = outputs.get()
            if output.text:
                show(output.text)
            if output.is_finished:
                return output
    except KeyboardInterrupt:
        if request_id is None:
            return None
        deployment.engine.cancel(request_id)
        try:
            while not (output := outputs.get(timeout=_CANCEL_SECONDS)).is_finished:
                if output.text:
                    show(output.text)
        except queue.Empty:
            return None
        return output
    except BaseException:  # nobody can read it
        if request_id is not None:
            deployment.engine.cancel(request_id)
        raise
