"""`--to ollama`: the GGUF file with a Modelfile, for `ollama create NAME -f Modelfile`.

The Modelfile says what the file cannot, or Ollama does not read there: the template in Go where its style is known, the
system message that the chat template has for conversations without one, sampling, and where an answer ends.
Grammar: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amalgam.composition.progress import Progress
from amalgam.engine.generation_config import read_model_defaults
from amalgam.errors import RequestError
from amalgam.text.chat import DEFAULT, ChatPrompt, ChatTemplates
from amalgam.text.files import has_tokenizer, read_folder
from amalgam.text.gguf.metadata import MODEL_KEY, build_tokenizer
from amalgam.text.rendering import TemplateError
from amalgam.tools.export.contract import ExportOptions, Job, PlannedModel, Target, Written
from amalgam.tools.export.llama_cpp.templates import Message, Style, style_of
from amalgam.tools.export.targets import gguf

FILE = "Modelfile"
# Ollama's names of what a checkpoint advises.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
_CONTEXT = 8192  # Ollama's own default, 4096 or less, cuts conversations off; a cache of this length fits beside most


def prepare(model: PlannedModel, options: ExportOptions) -> OllamaJob:
    """Raises the errors of an export to GGUF."""
    job = gguf.prepare(model, options)
    text, notes = modelfile(model)
    return OllamaJob(job, text, notes)


class OllamaJob(Job):
    """A GGUF file and what stands beside it."""

    def __init__(self, job: gguf.GgufJob, text: str, notes: Sequence[str]) -> None:
        self._job, self._text = job, text
        self.changes, self.nbytes = job.changes, job.nbytes + len(text.encode())
        self.notes = [*job.notes, *notes]

    def write(self, folder: Path, progress: Progress | None) -> Written:
        written = self._job.write(folder, progress)
        (folder / FILE).write_text(self._text, encoding="utf-8")
        return replace(written, notes=(*written.notes, f"In the folder: ollama create NAME -f {FILE}"))


def modelfile(model: PlannedModel) -> tuple[str, list[str]]:
    """The text, and what is to be said of it."""
    chat = _Chat(model)
    style = chat.style()
    lines = [f"# {model.name}, written by amalgam export --to ollama", f"FROM ./{gguf.FILE}"]
    notes = []
    if style is not None:
        lines += ["", f"# {style.name}", f"TEMPLATE {_quoted(style.go())}"]
        if style.default:
            lines.append(f"SYSTEM {_quoted(style.default)}")
    else:
        lines += ["", "# Ollama takes the chat template of the GGUF file."]
        why = "This chat template is of no known style" if chat.has_template else "The model has no chat template"
        notes.append(f"{why}: the Modelfile has no TEMPLATE, and Ollama goes by the GGUF file.")
    lines += ["", *chat.parameters(model.spec.max_positions)]
    return "\n".join(lines) + "\n", notes


class _Chat:
    """How the base checkpoint talks, and when it stops."""

    def __init__(self, model: PlannedModel) -> None:
        base = model.base
        self._advice = read_model_defaults(base.folder, base.store.metadata).from_model
        self._templates: ChatTemplates | None = None
        parts: Any = None
        ends: frozenset[int] = frozenset()
        if has_tokenizer(base.folder):
            parts, ends = read_folder(base.folder)
        elif base.store.metadata.get(MODEL_KEY) not in (None, "none"):
            parts, ends = build_tokenizer(base.store.metadata, str(base.folder))
        self._begin, self._stops = "", list[str]()
        if parts is None:
            return
        backend = parts.backend_tokenizer
        self._begin = parts.special_tokens_map.get("bos_token") or ""
        self._stops = [text for token_id in sorted(ends) if (text := backend.id_to_token(token_id))]
        sources = parts.chat_template or {}
        sources = {DEFAULT: sources} if isinstance(sources, str) else sources
        templates = ChatTemplates(sources, parts.special_tokens_map)
        self._templates = templates if templates.source() is not None else None

    @property
    def has_template(self) -> bool:
        return self._templates is not None

    def style(self) -> Style | None:
        """Of the chat template, if it is a known one."""
        if self._templates is None:
            return None
        return style_of(self._rendered, self._begin)

    def parameters(self, max_positions: int) -> Iterator[str]:
        """Lines that say how to sample, and where an answer ends."""
        yield f"PARAMETER num_ctx {min(max_positions, _CONTEXT)}"
        advice: dict[str, Any] = dict(self._advice)
        if advice.get("do_sample") is False:
            advice["temperature"] = 0.0
        for name, parameter in _PARAMETERS.items():
            if (value := advice.get(name)) is not None:
                yield (
                    f"PARAMETER {parameter} {value:g}" if isinstance(value, float) else f"PARAMETER {parameter} {value}"
                )
        for stop in dict.fromkeys([*self._stops, *(advice.get("stop") or ())]):
            yield f"PARAMETER stop {_quoted(stop)}"

    def _rendered(self, messages: Sequence[Message]) -> str:
        assert self._templates is not None
        try:
            return self._templates.render(ChatPrompt([dict(message) for message in messages]))[0]
        except (TemplateError, RequestError) as error:
            raise ValueError(str(error)) from None


def _quoted(text: str) -> str:
    """A value in a Modelfile: three quotes around what has line ends or quotes."""
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


TARGET = Target(
    name="ollama",
    summary="that GGUF file with a Modelfile, for ollama create",
    prepare=prepare,
    options=frozenset({"share", "type"}),
)
