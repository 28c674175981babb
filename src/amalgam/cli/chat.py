"""`amalgam chat`."""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

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
from amalgam.config.environment import state_folder
from amalgam.config.settings import Settings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import RequestOutput
from amalgam.errors import AmalgamError, ConflictError, RequestError, UnavailableError, UnsupportedError

if TYPE_CHECKING:
    from amalgam.cli.chat_input import Input
    from amalgam.cli.markdown import MarkdownWriter
    from amalgam.runtime.chats import Chats
    from amalgam.runtime.deployment import Deployment
    from amalgam.text.answers.contract import AnswerDelta

_HELP = """\
/help             this list
/reset            forget the conversation
/system TEXT      tell the model how to behave; none takes it back, nothing shows it
/experts COUNT    which experts this chat has used, and its busiest ones
/save FILE        keep the conversation: Markdown in FILE.md, JSON in any other
/set              show how answers are sampled
/set NAME VALUE   change it; none takes back a seed or a stop
/quit             end, as Ctrl-D does

Enter sends. Alt-Enter, or a backslash before Enter, begins a new line, and a
paste keeps its lines. A message that begins with / is sent as //…
Ctrl-C ends an answer, and clears what is typed."""
_ENDS = ("/quit", "/exit")
_CANCEL_SECONDS = 5.0
_MAX_NEW_TOKENS = 512
_NUM_EXPERTS = 10  # that /experts lists


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
    markdown: Annotated[bool, typer.Option(help="Lay answers out on a terminal; otherwise they are shown raw.")] = True,
) -> None:
    """Talk to the model in the terminal. /help lists the commands, Ctrl-D ends it."""
    from amalgam.cli.chat_input import open_input
    from amalgam.cli.console import is_terminal, note, progress_bar
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
        completed_params = completed(params, deployment.defaults, _MAX_NEW_TOKENS)
        _Chat(deployment, completed_params, system, lays_out=markdown and is_terminal(sys.stdout)).run(lines)
    finally:
        deployment.close()


class _Chat:
    """A conversation, and the commands that change it."""

    def __init__(self, deployment: Deployment, params: SamplingParams, system: str, *, lays_out: bool) -> None:
        from amalgam.runtime.chats import Chats

        self._deployment = deployment
        self._chats = Chats(deployment)
        self._params = params
        self._system = system
        self._lays_out = lays_out
        self._messages: list[dict[str, Any]] = []  # but for the system's

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
            self._messages = []
            note("The conversation is forgotten.")
        elif name == "/system":
            self._set_system(rest.strip())
        elif name == "/experts":
            self._show_experts(rest.strip())
        elif name == "/save":
            self._save(rest.strip())
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

    @property
    def _conversation(self) -> list[dict[str, Any]]:
        opening = [{"role": "system", "content": self._system}] if self._system else []
        return [*opening, *self._messages]

    def _set_system(self, text: str) -> None:
        from amalgam.cli.console import note

        if text:
            self._system = "" if text == "none" else text
        note(f"System message: {self._system}" if self._system else "There is no system message.")

    def _show_experts(self, text: str) -> None:
        """Nobody else uses the model, so that what is counted is this chat's."""
        from amalgam.cli.console import err, is_terminal
        from amalgam.cli.experts_view import page

        statistics = self._deployment.statistics
        if statistics is None:
            raise UnsupportedError(
                "This model's experts are not counted.", remedy="It has none, or statistics.enabled is false."
            )
        if text and not (text.isascii() and text.isdigit()):
            raise RequestError(f"/experts {text!r}.", remedy="Give how many are to be listed, or nothing.")
        height = err.height if is_terminal(sys.stderr) else None
        err.print(page(statistics.overview(None, int(text or _NUM_EXPERTS)), err.width, height))

    def _save(self, text: str) -> None:
        from amalgam.base.files import replace_file
        from amalgam.cli.console import note

        if not text:
            raise RequestError("/save has no file.", remedy="Name one: /save chat.md.")
        if not self._messages:
            raise RequestError("There is no conversation yet.", remedy="Say something first.")
        file = Path(text).expanduser()
        if file.exists():
            raise ConflictError(f"{str(file)!r} exists.", remedy="Name another file.")
        write = _as_markdown if file.suffix.lower() == ".md" else _as_json
        try:
            replace_file(file, write(self._deployment.model_name, self._conversation))
        except OSError as error:
            raise RequestError(f"{str(file)!r} cannot be written ({error.strerror}).", remedy="Name another.") from None
        note(f"Saved in {file}.")

    def _answer(self, text: str) -> None:
        from amalgam.cli.console import note
        from amalgam.runtime.chats import message_of

        asked = {"role": "user", "content": text}
        started = time.monotonic()
        view = _AnswerView(lays_out=self._lays_out)
        with view:
            last = _stream(self._deployment, self._chats, [*self._conversation, asked], self._params, view.show)
        if last is not None and last.error is not None:
            raise last.error
        if view.deltas:  # nothing is remembered of what was interrupted before it began
            self._messages += [asked, message_of(view.deltas)]
        if last is None or last.usage is None or last.finish_reason is None:
            note(f"Interrupted after {time.monotonic() - started:.1f} s.")
            return
        usage = last.usage
        speed = usage.num_new_tokens / max(usage.total_seconds, 1e-9)
        end = {"length": "cut at max_new_tokens", "cancelled": "interrupted"}.get(last.finish_reason.value, "")
        figures = f"{usage.num_prompt_tokens} + {usage.num_new_tokens} tokens, {speed:.1f} tokens/s"
        note(f"[{figures}{', ' * bool(end)}{end}]")


class _AnswerView:
    """One answer on the screen: its text on stdout, laid out if that is wanted; what it thinks before on stderr.

    Attributes:
        deltas: its parts so far.
    """

    def __init__(self, *, lays_out: bool) -> None:
        self.deltas: list[AnswerDelta] = []
        self._lays_out = lays_out
        self._open = ExitStack()
        self._writer: MarkdownWriter | None = None
        self._raw = ""  # the last piece that was written raw
        self._is_thinking = False

    def show(self, deltas: Sequence[AnswerDelta]) -> None:
        from amalgam.text.answers.contract import ContentDelta, ReasoningDelta

        for delta in deltas:
            self.deltas.append(delta)
            if isinstance(delta, ReasoningDelta):
                self._think(delta.text)
            elif isinstance(delta, ContentDelta):
                self._end_thinking()
                self._write(delta.text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_thinking()
        self._open.close()
        if self._raw and not self._raw.endswith("\n"):
            self._write_raw("\n")

    def _think(self, text: str) -> None:
        from rich.text import Text

        from amalgam.base.escaping import harmless
        from amalgam.cli.console import err

        self._is_thinking = True
        err.print(Text(harmless(text), "dim italic"), end="", soft_wrap=True)

    def _end_thinking(self) -> None:
        from amalgam.cli.console import err

        if self._is_thinking:
            err.print("\n")
        self._is_thinking = False

    def _write(self, text: str) -> None:
        if not self._lays_out:
            self._write_raw(text)
            return
        if self._writer is None:
            from amalgam.cli.console import out
            from amalgam.cli.markdown import MarkdownWriter

            self._writer = self._open.enter_context(MarkdownWriter(out))
        self._writer.write(text)

    def _write_raw(self, text: str) -> None:
        from amalgam.cli.console import write

        self._raw = text or self._raw
        write(text)


def _as_json(model: str, messages: Sequence[Mapping[str, Any]]) -> str:
    import json

    return json.dumps({"model": model, "messages": list(messages)}, ensure_ascii=False, indent=2) + "\n"


def _as_markdown(model: str, messages: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"# {model}", *(f"## {message['role']}\n\n{message['content'].strip()}" for message in messages)]
    return "\n\n".join(parts) + "\n"


def _stream(
    deployment: Deployment,
    chats: Chats,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    show: Callable[[Sequence[AnswerDelta]], None],
) -> RequestOutput | None:
    """Answer a conversation; Ctrl-C ends the answer. The last output, or None if it was interrupted too early."""
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    request_id: int | None = None
    try:
        token_ids = chats.encode(messages)
        parser = chats.parser(token_ids)
        request_id = deployment.engine.submit(token_ids, chats.params(params), outputs.put)
        while True:
            output = outputs.get()
            if output.text:
                show(parser.push(output.text))
            if output.is_finished:
                show(parser.finish())
                return output
    except KeyboardInterrupt:
        if request_id is None:
            return None
        deployment.engine.cancel(request_id)
        try:
            while not (output := outputs.get(timeout=_CANCEL_SECONDS)).is_finished:
                if output.text:
                    show(parser.push(output.text))
        except queue.Empty:
            return None
        finally:
            show(parser.finish())
        return output
    except BaseException:  # nobody can read it
        if request_id is not None:
            deployment.engine.cancel(request_id)
        raise
