"""`--to gguf`: one file that llama.cpp, Ollama, LM Studio and others open.

Types are llama.cpp's, tensor by tensor: what has an exact equivalent is carried over, what has none gets the nearest
type that is at least as wide (`amalgam.formats.gguf.carrying`). All experts of a layer's projection share a type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from amalgam.base.counting import counted
from amalgam.checkpoint.gguf_writer import FLOATS, GgufWriter, type_bytes
from amalgam.composition.progress import Progress
from amalgam.engine.generation_config import read_model_defaults
from amalgam.errors import ConfigError
from amalgam.formats.gguf.carrying import Truth, truth_in
from amalgam.formats.gguf.placing import Placing
from amalgam.formats.gguf.rounding import ROUNDED
from amalgam.models.spec import DRAFT_LAYERS
from amalgam.text.files import has_tokenizer, read_folder
from amalgam.text.gguf.metadata import MODEL_KEY
from amalgam.text.gguf.writing import NO_TOKENIZER, tokenizer_metadata
from amalgam.tools.export.contract import Change, ExportOptions, Job, PlannedModel, Target, Written
from amalgam.tools.export.llama_cpp.architectures import describe_model, sizes_of
from amalgam.tools.export.llama_cpp.checking import check_described
from amalgam.tools.export.llama_cpp.limits import check_limits
from amalgam.tools.export.llama_cpp.metadata import Model
from amalgam.tools.export.llama_cpp.tensors import Decider, Member, Stack, main_kind, stacks_of, write_stack

FILE = "model.gguf"
# llama.cpp's numbers for what a file's weights mostly are (`llama_ftype`).
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "MXFP4": 38,
}
_QUANTIZATION_VERSION = 2
# What generation_config.json advises, by llama.cpp's keys.
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"} | {
    "repetition_penalty": "penalty_repeat"
}
_HEADER_BYTES = 2**16
_REASONS = {
    Truth.EXACT: "llama.cpp has the same values in another type",
    Truth.SCALES: "llama.cpp's scales are float16",
    Truth.VALUES: "llama.cpp has no type with these values",
}


def prepare(model: PlannedModel, options: ExportOptions) -> GgufJob:
    """
    Raises:
        ConfigError: an option that has no meaning here.
        UnsupportedError: llama.cpp has no architecture for the model, or GGUF no word for something of it.
    """
    if options.share == "none":
        raise ConfigError(
            "--share none is for engines that hold each expert by itself.", remedy="Choose widest or narrowest."
        )
    if options.type is not None and options.type not in (*ROUNDED, *FLOATS):
        raise ConfigError(
            f"--type is {options.type!r}.",
            remedy=f"Types that values can be rounded to: {', '.join((*ROUNDED, *FLOATS))}.",
        )
    config = model.base.config
    looked_at = Model(model.spec, config.get("text_config") or config)
    architecture, described = describe_model(model.family.name, looked_at)
    undecided = stacks_of(model.planned, Placing(architecture, sizes_of(looked_at)))
    limits = check_limits(architecture, looked_at, [stack.name for stack in undecided])
    decider = Decider(undecided, options.type, narrowest=options.share == "narrowest")
    stacks = [decider.decided(stack) for stack in undecided]
    tokens, notes = _tokenizer(model)
    metadata = {
        **_about(model),
        "general.architecture": architecture,
        "general.type": "model",
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": 0,
        **_sampling(model),
        **described.keys,
        **tokens,
    }
    check_described(model.spec, metadata, described.tables, stacks)
    return GgufJob(model, metadata, described.tables, stacks, decider, [*notes, *limits])


class GgufJob(Job):
    """A file, decided and not written."""

    def __init__(
        self,
        model: PlannedModel,
        metadata: Mapping[str, Any],
        tables: Mapping[str, Any],
        stacks: Sequence[Stack],
        decider: Decider,
        notes: Sequence[str],
    ) -> None:
        self.model = model
        self.metadata = dict(metadata)
        self._tables = tables
        self._stacks = stacks
        self._decider = decider
        self.changes = list(self._changes())
        self.notes = [*notes, *self._left_out()]
        self.nbytes = _HEADER_BYTES + sum(stack.nbytes for stack in stacks) + _size(metadata)

    def write(self, folder: Path, progress: Progress | None) -> Written:
        ranks = {name: table.dim() for name, table in self._tables.items()}
        ranks |= {stack.name: len(stack.shape) for stack in self._stacks}
        total = sum(weight.nbytes for weight in self.model.planned)
        done = 0

        def advance(member: Member) -> None:
            nonlocal done
            done = min(total, done + member.weight.nbytes)
            if progress is not None:
                progress("Writing GGUF", done, total)

        writer = GgufWriter(folder / FILE, self.metadata, ranks)
        written: list[Stack] = []
        unforeseen: list[str] = []
        try:
            for name, table in self._tables.items():
                writer.add(name, tuple(table.shape), "F32", [table.float()])
            for stack in self._stacks:
                written.append(write_stack(writer, stack, self._decider, advance))
                if written[-1] is not stack:
                    kinds = f"{written[-1].kind}, foreseen was {stack.kind}"
                    unforeseen.append(
                        f"{stack.name} is {kinds}: not all of its weights are like those looked at first."
                    )
            self.metadata["general.file_type"] = _FILE_TYPES.get(main_kind(written), 0)
            writer.finish(self.metadata)
        finally:
            writer.close()
            for source in {id(weight.source): weight.source for weight in self.model.planned}.values():
                source.store.close()
        return Written(notes=unforeseen)

    def _changes(self) -> Iterator[Change]:
        for stack in self._stacks:
            for member in stack.members:
                change = self._change(stack, member)
                if change is not None:
                    yield change

    def _change(self, stack: Stack, member: Member) -> Change | None:
        weight = member.weight
        before = weight.format.name
        is_same = _plain(before) == stack.kind
        if member.is_wide and (weight.stored.is_wide or is_same):
            return None  # small, and exact in float32
        truth = truth_in(self._decider.kinds(member), stack.kind)
        if is_same and truth is Truth.EXACT:
            return None
        share = prod(member.shape) / prod(weight.slot.shape)
        is_widened = member.place.expert is not None and stack.kind != self._decider.alone(member)
        reason = "llama.cpp has one type for all experts of a layer" if is_widened else _REASONS[truth]
        if member.place.is_transposed and truth is Truth.VALUES:
            reason = "llama.cpp has the keys of latent attention the other way round"
        return Change(
            name=member.name,
            before=before,
            after=stack.kind,
            bytes_before=int(weight.nbytes * share),
            bytes_after=type_bytes(member.shape, stack.kind),
            is_exact=truth is Truth.EXACT,
            reason=reason,
        )

    def _left_out(self) -> Iterator[str]:
        base, family, spec = self.model.base, self.model.family, self.model.spec
        counts: Counter[str] = Counter()
        for name in base.weights.keys() - self.model.by_name.keys():
            layer = re.search(r"\.layers\.(\d{1,9})\.", name)
            is_draft = layer is not None and int(layer[1]) >= spec.num_layers
            what = DRAFT_LAYERS if is_draft else family.what_is_left_out(name, spec)
            counts.update([] if what is None else [what])
        for what, count in sorted(counts.items()):
            yield f"Left out: {counted(count, 'weight')} of {what}."


def _plain(name: str) -> str:
    """llama.cpp's name of a format, where it is one of GGUF's or unquantized."""
    return {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}.get(name, name.removeprefix("gguf_").upper())


def _size(metadata: Mapping[str, Any]) -> int:
    """Bytes of metadata, about."""
    lists = (value for value in metadata.values() if not isinstance(value, str | int | float))
    return sum(8 * len(value) + sum(len(item) for item in value if isinstance(item, str)) for value in lists)


def _tokenizer(model: PlannedModel) -> tuple[Mapping[str, Any], list[str]]:
    """Its keys, from the base checkpoint's files or its GGUF metadata, and what is to be said of them."""
    base = model.base
    if not has_tokenizer(base.folder):
        found = {key: value for key, value in base.store.metadata.items() if key.startswith("tokenizer.")}
        if MODEL_KEY in found:
            return found, []
        return NO_TOKENIZER, [f"{base.folder} has no tokenizer: llama.cpp takes token ids only."]
    parts, ends = read_folder(base.folder)
    keys = tokenizer_metadata(parts, ends, model.spec.vocab_size, str(base.folder))
    if not keys.num_differing:
        return keys.keys, []
    return keys.keys, [
        f"llama.cpp has no name for how this tokenizer cuts text into words. The nearest, {keys.name}, makes other "
        f"tokens of {keys.num_differing} of {keys.num_probes} texts in many scripts."
    ]


def _about(model: PlannedModel) -> dict[str, Any]:
    """The model's name, and what a GGUF file that it comes from says of its makers and its licence."""
    told = {
        key: value
        for key, value in model.base.store.metadata.items()
        if key.startswith("general.") and key != "general.alignment"
    }
    return told | ({"general.name": model.name} if model.settings.model.name or not told else {})


def _sampling(model: PlannedModel) -> dict[str, Any]:
    """What the base checkpoint advises about sampling."""
    advice = read_model_defaults(model.base.folder, model.base.store.metadata).from_model
    return {f"general.sampling.{key}": advice[name] for name, key in _SAMPLING.items() if name in advice}


TARGET = Target(
    name="gguf",
    summary="one GGUF file, for llama.cpp and what is built on it",
    prepare=prepare,
    options=frozenset({"share", "type"}),
)
