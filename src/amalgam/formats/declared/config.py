"""The declared quantization of a checkpoint, from config.json and the side files of older tools.

In: a folder and its config.json. Out: one `Declaration`, once every key of it was read. Must never know: tensors,
layers, families.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amalgam.base.folders import is_present, read_json
from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.formats.declared.keys import TRANSFORMS_OF_A_MODEL
from amalgam.formats.declared.methods import METHODS
from amalgam.formats.declared.reader import Reader
from amalgam.formats.declared.values import Declaration

# Files of ModelOpt, GPTQ and AWQ that declare what config.json does not, or declare it again.
_SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def read_declaration(folder: Path, config: Mapping[str, Any]) -> Declaration:
    """The declaration of a checkpoint: of its config.json, and of the side files of ModelOpt, GPTQ and AWQ.

    Raises:
        UnsupportedError: a method, layout, option or key that is not served or not known, by name.
        CheckpointError: a value of the wrong type, or two files that contradict each other.
    """
    found: Declaration | None = None
    nested = config.get("text_config")
    for part in (config, nested):
        if isinstance(part, Mapping):
            transforms = {key: part[key] for key in TRANSFORMS_OF_A_MODEL & part.keys()}
            Reader(transforms, str(folder / "config.json")).refuse_unread()
    declared = config.get("quantization_config") or (isinstance(nested, Mapping) and nested.get("quantization_config"))
    if "compression_config" in config and not declared:
        raise UnsupportedError(
            f"{folder / 'config.json'} has a compression_config, which old sparse-ml tools wrote.",
            remedy="Convert the checkpoint with a current version of compressed-tensors.",
        )
    if declared:
        found = parse_declaration(declared, str(folder / "config.json"), "quantization_config.")
    for name in _SIDE_FILES:
        if is_present(folder / name):
            side = _parse_side_file(read_json(folder, name), name, str(folder / name))
            if side is not None:
                found = side if found is None else _same(found, side)
    return found or Declaration()


def parse_declaration(config: Any, where: str, path: str = "") -> Declaration:
    """A `quantization_config` object; `where` names its file in messages, and `path` what stands before its keys.

    Raises:
        UnsupportedError, CheckpointError: see `read_declaration`.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} has quantization_config {describe(config)}.", remedy="Expected an object.")
    reader = Reader(config, where, path)
    method = reader.text("quant_method", "method", default="")
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    parse = METHODS.get(method)
    if parse is None:
        raise UnsupportedError(
            f"{where} declares quant_method {describe(method)}." if method else f"{where} declares no quant_method.",
            remedy=f"Known methods: {', '.join(sorted(METHODS))}.",
        )
    declaration = parse(reader, method)
    reader.refuse_unread()
    return declaration


def _parse_side_file(config: Mapping[str, Any], name: str, where: str) -> Declaration | None:
    if name == "hf_quant_config.json":
        whole = Reader(config, where)
        inner = whole.object("quantization")
        declaration = METHODS["modelopt"](inner, "modelopt")
        whole.refuse_unread()
        return declaration
    if name == "quant_config.json" and "w_bit" not in config and "quant_method" not in config:
        return None  # another tool's file of the same name
    default = "gptq" if name == "quantize_config.json" else "awq"
    return parse_declaration({"quant_method": default, **config}, where)


def _same(first: Declaration, second: Declaration) -> Declaration:
    """The first, once it is clear that the second says nothing else of any weight."""
    for attribute in ("method", "layout", "bits", "group_size", "strategy", "is_symmetric"):
        one, other = (getattr(declaration.default, attribute) for declaration in (first, second))
        if None not in (one, other) and one != other:
            raise CheckpointError(
                f"{first.default.where} declares {attribute} {one!r}, {second.default.where} declares {other!r}.",
                remedy="Keep the file that belongs to the weights.",
            )
    return first
