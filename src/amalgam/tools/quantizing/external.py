"""A checkpoint quantized by another tool, checked before it counts.

In: a wide checkpoint, what is asked for, the tool's environment. Out: a folder with the tool's weights beside the base
checkpoint's configuration and tokenizer; a report. Must never know how a tool chooses codes.

The tool is a process of its own (`worker.py`). It reads the token ids that our own methods would be calibrated with. A
result is taken only if our formats recognise every weight, in the bits and groups that were asked for, with finite
values. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amalgam.base.counting import counted
from amalgam.base.files import check_free, resumable_folder, writing
from amalgam.base.strict_json import parse_json
from amalgam.checkpoint.store import TensorStore
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.carry import carry_files, write_json
from amalgam.composition.check import HEAD, SourceCheck
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.planned import oriented
from amalgam.composition.progress import Progress
from amalgam.composition.quantizing.recipe import CalibrationTexts, check_activations, input_arguments
from amalgam.composition.quantizing.report import QuantizeReport
from amalgam.composition.source import Source
from amalgam.errors import CheckpointError, ConfigError, UnavailableError, UnsupportedError
from amalgam.formats.contract import StoredWeight
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.models.registry import fused_tensors, read_spec
from amalgam.models.spec import Family, ModelSpec, Slot
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.quantizing import worker
from amalgam.tools.quantizing.environment import Environment
from amalgam.tools.quantizing.harmless import without_code
from amalgam.tools.quantizing.processes import kill_group

logger = logging.getLogger("amalgam.tools")

_MAX_LINES = 30  # of what a tool says, in a message
_MAX_LINE_BYTES = 2**16
_SETTLE_SECONDS = 10.0
# Vectors that only changed their type, or were divided and multiplied again, differ by less.
_VECTOR_TOLERANCE = 0.01


@dataclass(frozen=True)
class Tool:
    """
    Attributes:
        distribution: as pip calls it.
        requirements: what an environment for it is made of.
        methods: method → formats that it makes; the first method is the one that it is known for.
        needs_texts: methods that read calibration texts.
        rounds_activations: whether it declares 8-bit activations.
    """

    name: str
    distribution: str
    requirements: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]
    needs_texts: frozenset[str]
    rounds_activations: bool = False

    @property
    def version(self) -> str:
        """Of the environment that is made on demand."""
        return self.requirements[0].partition("==")[2]


_TORCH = "torch==2.13.0"
_PACKED = ("int4", "int3", "int2", "int8-packed")
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "auto-round",
            "auto-round",
            ("auto-round==0.16.1", _TORCH),
            {"signround": _PACKED, "round": _PACKED},
            frozenset({"signround"}),
        ),
        Tool(
            "llm-compressor",
            "llmcompressor",
            ("llmcompressor==0.14.0.1", _TORCH),
            {"gptq": (*_PACKED, "int8"), "awq": (*_PACKED, "int8"), "round": (*_PACKED, "int8", "fp8")},
            frozenset({"gptq", "awq"}),
            rounds_activations=True,
        ),
        Tool(
            "gptqmodel",
            "gptqmodel",
            ("gptqmodel==7.7.0", "torch>=2.14.1"),
            {"gptq": _PACKED},
            frozenset({"gptq"}),
        ),
    )
}


@dataclass(frozen=True)
class ExternalRecipe:
    """What a tool is asked for; see `Recipe`.

    Attributes:
        method: of the tool's; None: the first.
        damping, act_order: of GPTQ.
        iterations: of SignRound, for each layer.
    """

    format_name: str
    options: QuantizeOptions = QuantizeOptions()
    method: str | None = None
    activations: str | None = None
    texts: CalibrationTexts | None = None
    damping: float = 0.01
    act_order: bool = True
    iterations: int = 200


def tool_of(name: str) -> Tool:
    """
    Raises:
        UnsupportedError: there is none of that name.
    """
    if name not in TOOLS:
        raise UnsupportedError(f"There is no tool {name!r}.", remedy=f"Tools: {', '.join(TOOLS)}.")
    return TOOLS[name]


def checked_method(tool: Tool, recipe: ExternalRecipe) -> str:
    """The method, when the tool has it and makes the format with it, and its texts are there.

    Raises:
        ConfigError: something is missing, or not the tool's.
    """
    method = recipe.method or next(iter(tool.methods))
    if method not in tool.methods:
        raise ConfigError(f"{tool.name} has no method {method!r}.", remedy=f"Methods: {', '.join(tool.methods)}.")
    if recipe.format_name not in tool.methods[method]:
        raise ConfigError(
            f"{tool.name} does not make {recipe.format_name!r} by {method}.",
            remedy=f"It makes {', '.join(tool.methods[method])}.",
        )
    if recipe.activations is not None and not (tool.rounds_activations and recipe.format_name in ("fp8", "int8")):
        raise ConfigError(
            f"{tool.name} declares no {recipe.activations!r} activations beside {recipe.format_name}.",
            remedy="They go with llm-compressor's fp8 and int8.",
        )
    check_activations(recipe.activations, recipe.options)
    needs = method if method in tool.needs_texts else "static" if recipe.activations == "static" else None
    if needs and recipe.texts is None:
        raise ConfigError(f"{needs!r} needs texts to calibrate with.", remedy="Give files of texts (--calibrate).")
    if method not in tool.needs_texts and recipe.texts is not None and recipe.activations != "static":
        raise ConfigError(f"{method!r} reads no calibration texts.", remedy="Leave them out, or choose another method.")
    return method


def quantize_with(
    tool: Tool,
    open_environment: Callable[[], Environment],
    checkpoint: str,
    out_folder: Path,
    recipe: ExternalRecipe,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Let a tool quantize the linear weights of `checkpoint` into `out_folder`.

    Args:
        open_environment: the tool's; asked for when all else is known to be right, since it may have to be made.

    Nothing is left behind when it fails or is killed, but for a folder `.NAME.partial` that the next run removes.

    Raises:
        CheckpointError: the folder exists; the checkpoint is damaged, quantized already or no folder of safetensors;
            what the tool has made is not the model in the precision that was asked for.
        ConfigError: an option that the format or the tool does not take; texts that cannot be read or are too short.
        ConflictError: another process is writing the folder.
        UnavailableError: the tool has failed.
    """
    method = checked_method(tool, recipe)
    check_free(out_folder)
    base = _Base.open(checkpoint)
    job = _job(tool, method, base, recipe)
    report = QuantizeReport(out_folder, recipe.format_name, method)
    report.num_tokens = sum(map(len, job["token_ids"]))
    with resumable_folder(out_folder, lambda partial: False) as folder, writing(out_folder):
        environment = open_environment()
        report.tool = f"{tool.name} {environment.version}"
        work = folder / ".work"
        made = work / "made"
        work.mkdir()
        without_code(base.source, work / "model")
        places = {"model": str((work / "model").absolute()), "out": str(made.absolute())}
        (work / "job.json").write_text(json.dumps({**job, **places}))
        _Process(tool, environment, work).follow(progress)
        saved = _saved(tool, made)
        _take(saved, base, folder)
        config = {**base.source.config, "quantization_config": _declaration(tool, saved)}
        write_json(folder / CONFIG_NAME, config)
        report.left_out_files = carry_files(base.source.store, folder)
        shutil.rmtree(work)
        _Check(tool, base, folder, job["weights"], report).run(progress)
    return report


@dataclass(frozen=True, eq=False)
class _Base:
    """The wide checkpoint.

    Attributes:
        slots: by logical name.
        quantized: names of the weights that are to become narrow.
    """

    source: Source
    family: Family
    spec: ModelSpec
    slots: Mapping[str, Slot]
    quantized: Sequence[str]

    @classmethod
    def open(cls, checkpoint: str) -> _Base:
        source = Source.open("base", checkpoint, fused_tensors)
        if not source.config:
            raise CheckpointError(source.config_place, remedy=f"The model's sizes stand in {CONFIG_NAME}.")
        if any(file.suffix != ".safetensors" for file in source.store.files):
            raise CheckpointError(
                f"{source.folder} holds {source.store.files[0].name}; other tools are given safetensors only.",
                remedy="Convert it first.",
            )
        family, spec = read_spec(source.config, source.config_place)
        slots = {family.logical_name(slot): slot for slot in spec.slots}
        source = replace(source, weights=family.with_whole_names(source.weights, slots))
        unfit = [name for name in slots if name not in source.weights or not source.weights[name].is_wide]
        if unfit:
            raise CheckpointError(
                f"{source.folder} has {counted(len(unfit), 'weight')} not, or quantized already, for instance "
                f"{unfit[0]!r}.",
                remedy="Give the bf16, fp16 or fp32 checkpoint.",
            )
        quantized = [name for name, slot in slots.items() if slot.is_linear and slot.role != "head"]
        return cls(source, family, spec, slots, quantized)


def _job(tool: Tool, method: str, base: _Base, recipe: ExternalRecipe) -> dict[str, Any]:
    """What `worker.py` reads, but for the folders of the model and of the result."""
    weight_format = writable_format(recipe.format_name)
    shapes = {base.slots[name].shape for name in base.quantized}
    schemes = {}
    for shape in shapes:
        scheme = weight_format.scheme(weight_format.grid((shape[0], shape[1]), torch.float32, recipe.options))
        schemes[json.dumps(scheme.arguments, sort_keys=True)] = dict(scheme.arguments)
    if len(schemes) > 1:
        sizes = sorted({arguments.get("group_size", 0) for arguments in schemes.values()})
        raise ConfigError(
            f"The model's weights fit groups of {' and '.join(map(str, sizes))}; {tool.name} takes one size for all.",
            remedy=f"Give --group-size {sizes[0]}.",
        )
    (arguments,) = schemes.values()
    token_ids: list[list[int]] = []
    if recipe.texts is not None:
        tokenizer = Tokenizer.load(base.source.folder, base.source.store.metadata)
        token_ids = recipe.texts.read(tokenizer, base.spec)
    others = [name for name, slot in base.slots.items() if slot.role == "head" or slot.decides]
    return {
        "tool": tool.name,
        "method": method,
        "weights": arguments,
        "input_activations": input_arguments(recipe.activations, arguments),
        "ignore": ["lm_head", *(name.removesuffix(".weight") for name in others if name != HEAD)],
        "damping": recipe.damping,
        "act_order": recipe.act_order,
        "iterations": recipe.iterations,
        "token_ids": token_ids,
        "sequence_length": max(map(len, token_ids), default=1),
    }


class _Process:
    """A tool at work in a folder, where it leaves what it likes; it and what it has started end with us."""

    def __init__(self, tool: Tool, environment: Environment, folder: Path) -> None:
        self._tool = tool
        self._command = [str(environment.python), "-I", worker.__file__, "job.json"]
        self._folder = folder
        self._log = folder / "log.txt"

    def follow(self, progress: Progress | None) -> None:
        """
        Raises:
            UnavailableError: it has failed; with the last that it said.
        """
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            try:
                threading.Thread(target=_kill_behind, args=(process,), daemon=True).start()
                assert process.stdout is not None
                while line := process.stdout.readline(_MAX_LINE_BYTES):
                    self._tell(line, progress)
                code = process.wait()
            finally:
                _end(process)
        if code:
            last = _last_lines(self._log)
            how = f"was ended by signal {-code}" if code < 0 else f"has failed ({code})"
            raise UnavailableError(
                "\n".join((f"{self._tool.name} {how}. Its last lines:", *last)),
                remedy="\nNothing is left of it. Too little memory, or a model that it does not know?",
            )

    def _tell(self, line: bytes, progress: Progress | None) -> None:
        if progress is None:
            return
        try:
            said = parse_json(line)
            what, done, total = str(said["what"]), int(said["done"]), int(said["total"])
        except (ValueError, KeyError, TypeError):
            return
        progress(f"{self._tool.name}: {what}" if what else self._tool.name, done, total)


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as stream:  # which may be of any size
        stream.seek(max(0, log.stat().st_size - _MAX_LINE_BYTES))
        said = stream.read(_MAX_LINE_BYTES).decode(errors="replace").splitlines()
    return [line for line in said if line.strip()][-_MAX_LINES:]


def _kill_behind(process: subprocess.Popen[bytes]) -> None:
    """When a process is gone, its children: they may hold its pipes, so that these do not end."""
    process.wait()
    kill_group(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of its children."""
    kill_group(process)
    try:
        process.wait(_SETTLE_SECONDS)
    except subprocess.TimeoutExpired:  # as long as the kernel waits for a device; what went wrong before is told
        logger.warning("process %d has been killed and has not ended yet", process.pid)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _saved(tool: Tool, made: Path) -> Path:
    """Where a tool has saved the model: below the folder that it was told, or there."""
    folders = {file.parent for file in made.rglob("*.safetensors")}
    if len(folders) != 1:
        raise CheckpointError(f"{tool.name} has saved no model, or several, in {made}.", remedy=_REPORT)
    return folders.pop()


def _take(made: Path, base: _Base, folder: Path) -> None:
    """The tensors that a tool has saved, under the names that it gave them."""
    store = TensorStore.open(made)
    write_checkpoint(folder, _narrowed(store, base.source.store))
    store.close()


def _narrowed(store: TensorStore, base: TensorStore) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors one by one; those that a tool has only widened (it computes in float32 on a CPU) as they were."""
    for name in store:
        tensor = store.read(name)
        dtype = base[name].dtype if name in base else tensor.dtype
        if dtype.is_floating_point and tensor.is_floating_point() and dtype.itemsize < tensor.dtype.itemsize:
            narrow = tensor.to(dtype)
            tensor = narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
        yield name, tensor
        store.release(name)


def _declaration(tool: Tool, made: Path) -> dict[str, Any]:
    try:
        found = parse_json((made / CONFIG_NAME).read_bytes())["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{tool.name} has declared no quantization in its {CONFIG_NAME}.", remedy=_REPORT)
    return found


_REPORT = "This version of it does not do what is expected of it: try another one (--environment)."


class _Check:
    """Whether what a tool has made is the model in the precision that was asked for; counts bytes and errors."""

    def __init__(
        self, tool: Tool, base: _Base, folder: Path, arguments: Mapping[str, Any], report: QuantizeReport
    ) -> None:
        self._tool = tool
        self._base = base
        self._arguments = arguments
        self._report = report
        made = Source.open(tool.name, str(folder), fused_tensors)
        self._made = replace(made, weights=base.family.with_whole_names(made.weights, dict(base.slots)))

    def run(self, progress: Progress | None) -> None:
        """
        Raises:
            CheckpointError: it is not.
        """
        base, made = self._base, self._made
        check = SourceCheck(base.family, base.spec, base.slots, base.source.config_place, base.spec.max_positions)
        check.check(made)
        missing = [name for name in base.slots if name not in made.weights]
        wide = [name for name in base.quantized if name in made.weights and made.weights[name].is_wide]
        for what, names in (("no weight", missing), ("not quantized", wide)):
            if names:
                raise CheckpointError(
                    f"{self._tool.name} has {what} {names[0]!r}" + f" and {len(names) - 1} more." * (len(names) > 1),
                    remedy=_REPORT,
                )
        total = sum(base.source.weights[name].nbytes for name in base.slots)
        done = 0
        for name, slot in base.slots.items():
            self._check_weight(name, slot)
            done += base.source.weights[name].nbytes
            if progress is not None:
                progress("Checking", done, total)

    def _check_weight(self, name: str, slot: Slot) -> None:
        wide, stored = self._base.source.weights[name], self._made.weights[name]
        if stored.shape != wide.shape:
            raise self._error(name, f"has shape {list(stored.shape)} and not {list(wide.shape)}")
        old = self._values(self._base.source, wide, slot)
        new = self._values(self._made, stored, slot)
        if not bool(new.isfinite().all()):
            raise self._error(name, "holds NaN or infinity")
        role = self._report.count(slot.role, wide.nbytes, stored.nbytes)
        if stored.is_wide:
            if not torch.allclose(new, old, rtol=_VECTOR_TOLERANCE, atol=1e-6):
                self._report.moved.append(name)
            return
        bits = stored.bits or stored.format.bits
        if bits != self._arguments["num_bits"]:
            raise self._error(name, f"has {bits} bits and not {self._arguments['num_bits']}")
        size = self._arguments.get("group_size")
        if size is not None and (stored.block is None or stored.block[1] != size):
            raise self._error(name, f"has blocks of {stored.block} and not groups of {size}")
        role.squared_error += float((new - old).square().sum())
        role.squared_norm += float(old.square().sum())

    @staticmethod
    def _values(source: Source, stored: StoredWeight, slot: Slot) -> torch.Tensor:
        return source.load(stored, lambda packed: oriented(packed, stored, slot)).dequantize(torch.float32)

    def _error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"Weight {name!r} that {self._tool.name} has made {what}.", remedy=_REPORT)
