"""Decided weights → a checkpoint folder: safetensors, config.json, and what the base checkpoint has beside them.

In: decisions, a `Dialect`, which encodes weights and declares them. Out: the folder, file by file, so that an
interrupted run goes on behind those that are complete. Must never know: which engine is to read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from amalgam.checkpoint.store import TensorEntry
from amalgam.composition.carry import carry_files, left_out_tensors, weights_besides, without_drafts, write_json
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.progress import Progress
from amalgam.composition.quantizing.shards import Shards, has_shards
from amalgam.config.placement import Rule, build_rules
from amalgam.errors import UnsupportedError
from amalgam.formats.contract import ACTIVATION_SUFFIXES, StoredWeight, owned
from amalgam.formats.fused import TensorSlice, whole_of
from amalgam.kernels.weights import PackedWeight
from amalgam.tools.export.choosing import Decision, changes_of
from amalgam.tools.export.contract import Job, PlannedModel, Written
from amalgam.tools.export.encoding import converted
from amalgam.tools.export.forms import Form, form_of
from amalgam.version import __version__

SHARD_BYTES = 2 * 2**30
# Other tools' declarations, which would contradict the new one.
_SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Dialect:
    """How a folder stores and declares quantized weights.

    Attributes:
        name: for messages.
        encode: logical name, weight, form → its tensors by suffix.
        is_native: whether a stored weight has these very tensors already.
        declare: decisions, the module that each weight is published as, and modules beside the model's, which are not
            quantized → keys of config.json, and further files.
        keeps_stacked: whether experts that the base checkpoint has in one tensor may stay so.
    """

    name: str
    encode: Callable[[str, PackedWeight, Form], Tensors]
    is_native: Callable[[Form, StoredWeight], bool]
    declare: Callable[[Sequence[Decision], Mapping[str, str], Sequence[str]], tuple[dict[str, Any], dict[str, Any]]]
    keeps_stacked: bool = False


@dataclass(frozen=True)
class _Piece:
    """Tensors that are made together."""

    names: tuple[str, ...]
    nbytes: int
    make: Callable[[], Tensors]


class CheckpointJob(Job):
    """Writes decided weights.

    Args:
        values: logical name → what a weight is to be in place of what its source holds, in the runtime layout that it
            has from there.

    Raises:
        UnsupportedError: the family keeps weights in tensors that hold no quantized ones.
        PlanError: sources that weights were moved to do not fit their neighbours.
    """

    def __init__(
        self,
        model: PlannedModel,
        decisions: Sequence[Decision],
        dialect: Dialect,
        notes: Sequence[str] = (),
        values: Mapping[str, PackedWeight] | None = None,
    ) -> None:
        self._model = model
        self._decisions = decisions
        self._dialect = dialect
        self._values = values or {}
        self._check_moved()
        self._besides = weights_besides(model.base, model.family, model.spec, set(model.by_name))
        self._pieces = list(self._all_pieces())
        self.changes = changes_of(model, decisions)
        self.nbytes = sum(piece.nbytes for piece in self._pieces)
        self.notes = notes

    def has_begun(self, folder: Path) -> bool:
        return has_shards(folder)

    def write(self, folder: Path, progress: Progress | None) -> Written:
        parts = self._parts()
        shards = Shards(folder, len(parts), self._settings())
        done = sum(piece.nbytes for part in parts[: shards.num_complete] for piece in part)
        for part in parts[shards.num_complete :]:
            tensors: Tensors = {}
            for piece in part:
                tensors |= piece.make()
                done += piece.nbytes
                if progress is not None:
                    progress("Exporting", done, self.nbytes)
            shards.add(tensors, {})
        shards.finish()
        left_out = left_out_tensors(self._model.base, {*self._model.by_name, *self._besides})
        return Written([*left_out, *self._write_config(folder, left_out)])

    def _write_config(self, folder: Path, left_out: Sequence[str]) -> list[str]:
        """
        Returns:
            Files that are left out.
        """
        base = self._model.base
        config = {key: value for key, value in base.config.items() if key != "quantization_config"}
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
        modules = {decision.name: self._module(decision.name) for decision in self._decisions}
        others = [name.removesuffix(".weight") for name in self._besides if len(base.weights[name].shape) == 2]
        declared, files = self._dialect.declare(self._decisions, modules, others)
        config |= without_drafts(config, left_out, self._model.spec) | declared
        if "dtype" not in config and "torch_dtype" not in config:
            floats = [decision for decision in self._decisions if decision.form.is_float]
            widest = max(floats, key=lambda decision: decision.nbytes)
            config["dtype"] = str(widest.form.dtype).removeprefix("torch.")
        write_json(folder / CONFIG_NAME, config)
        left_out_files = carry_files(base.store, folder)
        for name in _SIDE_FILES:
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            write_json(folder / name, content)
        return left_out_files

    def _settings(self) -> dict[str, Any]:
        """What the files' bytes depend on."""
        base = self._model.base
        identities = [
            (decision.weight.source.identity(decision.weight.stored), str(decision.form), decision.is_same)
            for decision in self._decisions
        ]
        identities += [(base.identity(base.weights[name]), "", True) for name in self._besides]
        return {
            "target": self._dialect.name,
            "weights": hashlib.sha256(repr(identities).encode()).hexdigest()[:16],
            "shard_bytes": SHARD_BYTES,
            "version": __version__,
        }

    def _parts(self) -> list[list[_Piece]]:
        """Pieces by the file that they go to."""
        parts: list[list[_Piece]] = []
        room = 0
        for piece in self._pieces:
            if not parts or room < piece.nbytes:
                parts.append([])
                room = SHARD_BYTES
            parts[-1].append(piece)
            room -= piece.nbytes
        return parts

    def _all_pieces(self) -> Iterator[_Piece]:
        """Weights in order; those that the base checkpoint keeps in one tensor together, where they stay so."""
        whole = self._whole_tensors()
        done: set[str] = set()
        for decision in self._decisions:
            if decision.name in done:
                continue
            if decision.name in whole:
                piece = whole[decision.name]
                done.update(piece.names)
                yield piece
                continue
            self._check_known(decision)
            yield _Piece((decision.name,), decision.nbytes, partial(self._tensors, decision))
        for name in self._besides:
            stored = self._model.base.weights[name]
            yield _Piece((name,), stored.nbytes, partial(self._beside, name, stored))

    def _whole_tensors(self) -> dict[str, _Piece]:
        """Logical name → the tensor of the base checkpoint that it stays a part of, all others of which do, too."""
        base = self._model.base
        by_tensor: dict[TensorEntry, list[str]] = {}
        kept: set[str] = set()
        for decision in self._decisions:
            stored = base.weights.get(decision.name)
            if stored is None or not all(isinstance(part, TensorSlice) for part in stored.parts.values()):
                continue
            for part in stored.parts.values():
                by_tensor.setdefault(whole_of(part), []).append(decision.name)
            is_kept = decision.form.is_float and decision.weight.stored is stored
            if is_kept and decision.name not in self._values:
                kept.add(decision.name)
        stays = self._dialect.keeps_stacked or not all(map(self._is_divisible, self._model.by_name))
        pieces: dict[str, _Piece] = {}
        for tensor, names in by_tensor.items() if stays else ():
            if kept.issuperset(names):
                piece = _Piece(tuple(names), tensor.nbytes, partial(self._whole, tensor))
                pieces |= dict.fromkeys(names, piece)
        return pieces

    def _is_divisible(self, name: str) -> bool:
        """Whether the base checkpoint's family is published with a tensor for this weight alone, too.

        Experts are, unless their one tensor has a name or an order of the family's own; gate and up in one are not.
        """
        stored = self._model.base.weights.get(name)
        slices = [part for part in ({} if stored is None else stored.parts).values() if isinstance(part, TensorSlice)]
        return not any(
            part.is_transposed
            or (part.index is None and part.rows is not None)
            or (part.index is not None and ".experts" not in part.whole.name)
            for part in slices
        )

    def _whole(self, tensor: TensorEntry) -> Tensors:
        base = self._model.base
        copy = owned(base.read(tensor))
        base.release(tensor)
        return {tensor.name: copy}

    def _check_known(self, decision: Decision) -> None:
        """Raise UnsupportedError if a weight has no published name of its own in its family."""
        if not self._is_divisible(decision.name):
            raise UnsupportedError(
                f"Family {self._model.family.name!r} keeps weight {decision.name!r} with others in one tensor, which "
                f"an export to {self._dialect.name} cannot divide.",
                remedy="Take all of these weights from the base checkpoint.",
            )

    def _check_moved(self) -> None:
        """Check a plan whose weights come from where the decisions take them: neighbours have to agree."""
        moved = {
            decision.name: decision.weight.choice.source
            for decision in self._decisions
            if decision.weight is not self._model.by_name[decision.name]
        }
        if moved:
            rules: tuple[Rule, ...] = self._model.settings.model.mixed_precision.all_rules
            self._model.loader.plan((*rules, *build_rules(moved)))

    def _module(self, name: str) -> str:
        """What a weight's tensors are called, without suffix: as the base checkpoint calls it, if that has it alone."""
        return self._tensor_name(name).removesuffix(".weight")

    def _tensor_name(self, name: str) -> str:
        """What a floating weight is called."""
        base = self._model.base
        stored = base.weights.get(name)
        if stored is None or base.store.metadata:
            return name
        role, part = next(iter(stored.parts.items()))
        if isinstance(part, TensorSlice):
            return name
        return part.name if stored.is_wide else f"{part.name.removesuffix(f'.{role}')}.weight"

    def _tensors(self, decision: Decision) -> Tensors:
        name, weight, form = decision.name, decision.weight, decision.form
        if self._is_carried(decision):
            parts = {role: part for role, part in weight.stored.parts.items() if role not in ACTIVATION_SUFFIXES}
            tensors = {role: owned(weight.source.read(part)) for role, part in parts.items()}
            weight.source.release(*parts.values())
            return {f"{self._module(name)}.{role}": tensor for role, tensor in tensors.items()}
        packed = converted(name, self._values.get(name) or weight.unprepared(), form, decision.is_same)
        if form.is_float:
            values = packed.dense.t().contiguous() if weight.slot.is_transposed else packed.dense
            return {self._tensor_name(name): values}
        tensors = self._dialect.encode(name, packed, form)
        return {f"{self._module(name)}.{role}": tensor for role, tensor in tensors.items()}

    def _is_carried(self, decision: Decision) -> bool:
        weight = decision.weight
        is_plain = weight.quantize_to is None and weight.stored.arrange is None and not decision.form.is_float
        is_plain = is_plain and decision.name not in self._values
        return is_plain and decision.form == form_of(weight) and self._dialect.is_native(decision.form, weight.stored)

    def _beside(self, name: str, stored: StoredWeight) -> Tensors:
        return {name: self._model.base.load(stored).dense}
