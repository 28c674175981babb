"""What a checkpoint says about its own quantization, as one typed object.

In: config.json's `quantization_config`, or the side file of an older tool. Out: `Declaration.of(module)`: bits, groups
and layout that are declared for one module. Formats read it where tensors alone do not tell (zero points of GPTQ, order
of AWQ's words), and the source compares it with the tensors everywhere else. Must never know: layers, families.

An unknown method, an option that changes the meaning of weights, or a value that nobody here understands is refused.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from amalgam.checkpoint.source import read_json
from amalgam.errors import CheckpointError, UnsupportedError, describe

# Files of ModelOpt, GPTQ and AWQ that declare what config.json does not, or declare it again.
_SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_MAX_PATTERN = 1000
_MAX_REPEATS = 8
_NESTED_REPEAT = re.compile(r"\((?:[^()\\]|\\.)*(?<!\\)[*+](?:[^()\\]|\\.)*\)[*+{]")


@dataclass(frozen=True)
class Declared:
    """What is declared for one module. None: nothing is said, the tensors decide.

    Attributes:
        method: `quant_method`.
        where: the file that says so.
        is_quantized: whether the module is named as quantized, or as left alone.
        layout: the arrangement of bits, where a method has several: `gptq`, `gptq_v2`, `awq`, `nf4`, or the name that
            the checkpoint uses.
        number: `int` or `float`.
        strategy: which weights share a scale: tensor, channel, group, block.
        group_size: inputs that share a scale; -1: all of a row.
        block: (rows, columns) that share a scale.
    """

    method: str | None = None
    where: str = ""
    is_quantized: bool | None = None
    layout: str | None = None
    bits: int | None = None
    number: str | None = None
    strategy: str | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None
    is_symmetric: bool | None = None

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """`(rows, columns)` of a weight `[out, in]` that share a scale; None if nothing is said."""
        rows, columns = shape
        if self.strategy == "tensor":
            return rows, columns
        if self.strategy == "channel":
            return 1, columns
        if self.strategy == "block":
            return self.block
        if self.strategy == "group" and self.group_size is not None:
            return (1, columns) if not 0 < self.group_size < columns else (1, self.group_size)
        return None


UNDECLARED = Declared()
Matches = Callable[[str], bool]


@dataclass(frozen=True)
class Declaration:
    """A checkpoint's declared quantization.

    Attributes:
        default: what holds for a module that nothing else names.
        named: module → what holds for it.
        rules: in order; the first that matches holds for a module that `named` does not know.
    """

    default: Declared = UNDECLARED
    named: Mapping[str, Declared] = field(default_factory=dict)
    rules: tuple[tuple[Matches, Declared], ...] = ()

    def of(self, module: str) -> Declared:
        """What is declared for a module; its name without `.weight`."""
        found = self.named.get(module)
        if found is not None:
            return found
        return next((declared for matches, declared in self.rules if matches(module)), self.default)


def read_declaration(folder: Path, config: Mapping[str, Any]) -> Declaration:
    """The declaration of a checkpoint: of its config.json, and of the side files of ModelOpt, GPTQ and AWQ.

    Raises:
        UnsupportedError: a method, layout or option that is not served, by name.
        CheckpointError: a value of the wrong type, or two files that contradict each other.
    """
    found: Declaration | None = None
    nested = config.get("text_config")
    declared = config.get("quantization_config") or (isinstance(nested, Mapping) and nested.get("quantization_config"))
    if "compression_config" in config and not declared:
        raise UnsupportedError(
            f"{folder / 'config.json'} has a compression_config, which old sparse-ml tools wrote.",
            remedy="Convert the checkpoint with a current version of compressed-tensors.",
        )
    if declared:
        found = parse_declaration(declared, str(folder / "config.json"))
    for name in _SIDE_FILES:
        if (folder / name).is_file():
            side = _parse_side_file(read_json(folder, name), name, str(folder / name))
            if side is not None:
                found = side if found is None else _same(found, side)
    return found or Declaration()


def parse_declaration(config: Any, where: str) -> Declaration:
    """A `quantization_config` object; `where` names its file in messages.

    Raises:
        UnsupportedError, CheckpointError: see `read_declaration`.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} has quantization_config {describe(config)}.", remedy="Expected an object.")
    reader = _Reader(config, where)
    method = reader.text("quant_method", default="")
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    parse = _METHODS.get(method)
    if parse is None:
        raise UnsupportedError(
            f"{where} declares quant_method {describe(method)}." if method else f"{where} declares no quant_method.",
            remedy=f"Known methods: {', '.join(sorted(_METHODS))}.",
        )
    return parse(reader, method)


def _parse_side_file(config: Mapping[str, Any], name: str, where: str) -> Declaration | None:
    if name == "hf_quant_config.json":
        inner = config.get("quantization")
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{where} has quantization {describe(inner)}.", remedy="Expected an object.")
        return _modelopt(_Reader(inner, where), "modelopt")
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


class _Reader:
    """Typed access to a declaration; every complaint names the key, its value and the file."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def get(self, *keys: str) -> Any:
        return next((self.config[key] for key in keys if self.config.get(key) is not None), None)

    def integer(self, *keys: str, allowed: Iterable[int] | None = None, low: int | None = None) -> int | None:
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
            self.refuse(keys[0], value, "an integer" if low is None else f"an integer from {low}")
        if allowed is not None and value not in allowed:
            self.refuse(keys[0], value, ", ".join(map(str, allowed)))
        return int(value)

    def group_size(self, *keys: str) -> int | None:
        """A number of inputs, or -1 for all."""
        value = self.integer(*keys)
        if value is not None and value < 1 and value != -1:
            self.refuse(keys[0], value, "a positive number, or -1 for whole rows")
        return value

    def text(self, *keys: str, default: str | None = None) -> str:
        value = self.get(*keys)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.refuse(keys[0], value, "a string")
        return str(value)

    def flag(self, *keys: str) -> bool | None:
        value = self.get(*keys)
        if value is not None and not isinstance(value, bool):
            self.refuse(keys[0], value, "true or false")
        return value if isinstance(value, bool) else None

    def names(self, *keys: str) -> list[str]:
        value = self.get(*keys)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(keys[0], value, "a list of names")
        return list(value)

    def objects(self, key: str) -> dict[str, _Reader]:
        """An object of objects; empty if absent."""
        value = self.get(key) or {}
        if not isinstance(value, Mapping) or not all(isinstance(inner, Mapping) for inner in value.values()):
            self.refuse(key, value, "an object of objects")
        return {name: _Reader(inner, f"{self.where} ({key}: {name})") for name, inner in value.items()}

    def object(self, key: str) -> _Reader | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, value, "an object")
        return _Reader(value, f"{self.where} ({key})")

    def refuse(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise CheckpointError(f"{self.where} declares {key} {describe(value)}.", remedy=f"Expected {allowed}.")

    def unsupported(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise UnsupportedError(f"{self.where} declares {key} {describe(value)}.", remedy=f"Supported: {allowed}.")


# --- Which modules an entry names ---


def _within(entries: Iterable[str]) -> Matches:
    """Whole parts of a name: `mlp.gate` is in `model.layers.3.mlp.gate`, not in `….mlp.gate_proj`."""
    wanted = {tuple(entry.removesuffix(".weight").split(".")) for entry in entries if entry}
    lengths = {len(entry) for entry in wanted}

    def matches(module: str) -> bool:
        parts = tuple(module.split("."))
        return any(
            parts[start : start + length] in wanted for length in lengths for start in range(len(parts) - length + 1)
        )

    return matches


def _regex(reader: _Reader, key: str, patterns: Iterable[str], *, anywhere: bool = False) -> Matches:
    """Patterns matched from the start of a name (or anywhere), not bound to its end."""
    compiled = []
    for pattern in patterns:
        repeats = len(re.findall(r"(?<!\\)[*+]", pattern))
        if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or _NESTED_REPEAT.search(pattern):
            reader.refuse(key, pattern, f"patterns of at most {_MAX_REPEATS} repetitions, none within another")
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            reader.refuse(key, pattern, f"a regular expression ({error})")
    return lambda module: any((p.search if anywhere else p.match)(module) for p in compiled)


def _left_alone(reader: _Reader, base: Declared, *keys: str) -> tuple[tuple[Matches, Declared], ...]:
    """The rule of a list of modules that are not quantized; `*` in an entry stands for any text."""
    entries = reader.names(*keys)
    spared = replace(base, is_quantized=False)
    rules: list[tuple[Matches, Declared]] = []
    if plain := [entry for entry in entries if "*" not in entry]:
        rules.append((_within(plain), spared))
    if wild := [entry for entry in entries if "*" in entry]:
        rules.append((_wildcards(wild), spared))
    return tuple(rules)


def _wildcards(entries: Iterable[str]) -> Matches:
    """Shell wildcards over the whole name, or over the name of a module that it lies in."""
    pattern = re.compile("|".join(fnmatch.translate(entry).replace(r"\Z", r"(?=\.|\Z)") for entry in entries))
    return lambda module: pattern.match(module) is not None


# --- The methods ---


def _compressed_tensors(reader: _Reader, method: str) -> Declaration:
    """https://github.com/vllm-project/compressed-tensors: config_groups with targets, and an ignore list."""
    if transform := reader.get("transform_config"):
        reader.unsupported("transform_config", transform, "none; rotated weights need the rotation at run time")
    sparsity = reader.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        reader.unsupported("sparsity_config.format", sparsity["format"], "dense")
    layout = reader.text("format", default="dense")
    default = Declared(method, reader.where)
    named: dict[str, Declared] = {}
    rules: list[tuple[Matches, Declared]] = []
    by_class: dict[str, Declared] = {}
    for group in reader.objects("config_groups").values():
        weights = group.object("weights")
        if weights is None:
            continue
        declared = _quantization_args(weights, method, group.text("format", default=layout), reader)
        targets = group.names("targets")
        patterns = [target[3:] for target in targets if target.startswith("re:")]
        if patterns:
            rules.append((_regex(group, "targets", patterns), declared))
        for target in (target for target in targets if not target.startswith("re:")):
            if "." in target or target == "lm_head":
                named[target] = replace(declared, is_quantized=True)
            else:
                by_class[target] = declared
    if by_class:
        default = by_class.get("Linear") or next(iter(by_class.values()))
        if len({replace(declared, where="") for declared in by_class.values()}) > 1 and "Linear" not in by_class:
            reader.unsupported("config_groups", list(by_class), "one class of modules, or Linear among them")
    spared = replace(default, is_quantized=False)
    ignored = reader.names("ignore")
    if patterns := [entry[3:] for entry in ignored if entry.startswith("re:")]:
        rules.insert(0, (_regex(reader, "ignore", patterns), spared))
    is_ignored = rules[0][0] if patterns else (lambda module: False)
    named = {name: declared for name, declared in named.items() if not is_ignored(name)}
    named |= {entry: spared for entry in ignored if not entry.startswith("re:")}
    return Declaration(default, named, tuple(rules))


_CT_LAYOUTS = {
    "dense": None,
    "mixed-precision": None,
    "naive-quantized": None,
    "int-quantized": "int-quantized",
    "float-quantized": "float-quantized",
    "pack-quantized": "pack-quantized",
    "nvfp4-pack-quantized": "nvfp4-pack-quantized",
    "mxfp4-pack-quantized": "mxfp4-pack-quantized",
    "mxfp8-quantized": "mxfp8-quantized",
}
_CT_STRATEGIES = {"tensor": "tensor", "channel": "channel", "group": "group", "tensor_group": "group", "block": "block"}


def _quantization_args(weights: _Reader, method: str, layout: str, whole: _Reader) -> Declared:
    if layout not in _CT_LAYOUTS:
        whole.unsupported("format", layout, ", ".join(sorted(_CT_LAYOUTS)))
    group_size = weights.group_size("group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy not in _CT_STRATEGIES:
        weights.unsupported("strategy", strategy, ", ".join(_CT_STRATEGIES))
    if weights.get("dynamic") not in (None, False):
        weights.unsupported("dynamic", weights.get("dynamic"), "false for weights")
    return Declared(
        method,
        whole.where,
        layout=_CT_LAYOUTS[layout],
        bits=weights.integer("num_bits", low=1),
        number=weights.text("type", default="int"),
        strategy=_CT_STRATEGIES[strategy],
        group_size=group_size,
        block=_pair(weights, "block_structure"),
        is_symmetric=weights.flag("symmetric"),
    )


def _pair(reader: _Reader, key: str) -> tuple[int, int] | None:
    value = reader.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(part) for part in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(part) is int and part > 0 for part in value):
        reader.refuse(key, value, "two positive integers")
    return value[0], value[1]


def _fp8(reader: _Reader, method: str) -> Declaration:
    """DeepSeek's and Qwen's blocks, and the older scale per tensor."""
    if (fmt := reader.get("fmt")) not in (None, "e4m3"):
        reader.unsupported("fmt", fmt, "e4m3")
    if (expert := reader.get("expert_dtype")) not in (None, "fp8"):
        reader.unsupported("expert_dtype", expert, "fp8")
    block = _pair(reader, "weight_block_size")
    declared = Declared(
        method,
        reader.where,
        layout=reader.text("scale_fmt", default="float"),
        bits=8,
        number="float",
        strategy="block" if block else None,
        block=block,
    )
    if declared.layout not in ("float", "ue8m0"):
        reader.unsupported("scale_fmt", declared.layout, "float, ue8m0")
    return Declaration(declared, rules=_left_alone(reader, declared, "modules_to_not_convert", "ignored_layers"))


def _fbgemm_fp8(reader: _Reader, method: str) -> Declaration:
    declared = Declared(method, reader.where, bits=8, number="float", strategy="channel")
    return Declaration(declared, rules=_left_alone(reader, declared, "modules_to_not_convert"))


_MODELOPT = {
    "FP8": {"bits": 8, "number": "float", "strategy": "tensor"},
    "FP8_PER_CHANNEL_PER_TOKEN": {"bits": 8, "number": "float", "strategy": "channel"},
    "FP8_PB_WO": {"bits": 8, "number": "float", "strategy": "block", "block": (128, 128)},
    "MXFP8": {"bits": 8, "number": "float", "strategy": "group", "group_size": 32},
    "W8A16": {"bits": 8, "number": "int", "strategy": "channel"},
    "W8A8_SQ_PER_CHANNEL": {"bits": 8, "number": "int", "strategy": "channel"},
    "W4A16_AWQ": {"bits": 4, "number": "int", "strategy": "group"},
    "NVFP4": {"bits": 4, "number": "float", "strategy": "group", "group_size": 16},
    "NVFP4_AWQ": {"bits": 4, "number": "float", "strategy": "group", "group_size": 16},
    "W4A16_NVFP4": {"bits": 4, "number": "float", "strategy": "group", "group_size": 16},
    "W4A8_NVFP4_FP8": {"bits": 4, "number": "float", "strategy": "group"},
}


def _modelopt(reader: _Reader, method: str) -> Declaration:
    """NVIDIA ModelOpt: one `quant_algo`, or one per layer; exclusions are shell wildcards."""

    def algorithm(inner: _Reader) -> Declared:
        name = inner.text("quant_algo").upper()
        if name not in _MODELOPT:
            inner.unsupported("quant_algo", name, ", ".join(sorted(_MODELOPT)))
        declared = Declared("modelopt", reader.where, layout=name, **_MODELOPT[name])  # type: ignore[arg-type]
        group_size = inner.group_size("group_size")
        return (
            declared if declared.strategy != "group" or group_size is None else replace(declared, group_size=group_size)
        )

    plain = Declared("modelopt", reader.where)
    rules = _left_alone(reader, plain, "exclude_modules", "ignore")
    if reader.text("quant_algo", default="").upper() != "MIXED_PRECISION":
        if reader.get("quant_algo") is None:  # only the cache is quantized
            return Declaration(plain, rules=rules)
        return Declaration(algorithm(reader), rules=rules)
    layers = {
        name: replace(algorithm(inner), is_quantized=True) for name, inner in reader.objects("quantized_layers").items()
    }
    return Declaration(plain, layers, rules)


_WIDTHS = (2, 3, 4, 8)


def _gptq(reader: _Reader, method: str) -> Declaration:
    """GPTQ (AutoGPTQ, GPTQModel); `dynamic` maps a pattern to other settings, with `-:` to none."""
    layout = reader.text("checkpoint_format", "format", default="gptq")
    if layout not in ("gptq", "gptq_v2"):
        reader.unsupported("checkpoint_format", layout, "gptq, gptq_v2")
    if (packed := reader.get("pack_dtype")) not in (None, "int32"):
        reader.unsupported("pack_dtype", packed, "int32")
    default = _int_settings(reader, Declared(method, reader.where, layout=layout, number="int", strategy="group"))
    rules: list[tuple[Matches, Declared]] = []
    for pattern, inner in reader.objects("dynamic").items():
        is_skipped = pattern.startswith("-:")
        matches = _regex(reader, "dynamic", [re.sub(r"^[+-]:", "", pattern)])
        rules.append((matches, replace(default, is_quantized=False) if is_skipped else _int_settings(inner, default)))
    if reader.flag("lm_head") is False:
        rules.append((lambda module: module == "lm_head", replace(default, is_quantized=False)))
    return Declaration(default, rules=tuple(rules))


def _int_settings(reader: _Reader, base: Declared) -> Declared:
    """`base` with the bits, group size and symmetry that an object sets."""
    bits, group_size = reader.integer("bits", "w_bit", allowed=_WIDTHS), reader.group_size("group_size", "q_group_size")
    is_symmetric = reader.flag("sym")
    return replace(
        base,
        bits=base.bits if bits is None else bits,
        group_size=base.group_size if group_size is None else group_size,
        is_symmetric=base.is_symmetric if is_symmetric is None else is_symmetric,
    )


def _awq(reader: _Reader, method: str) -> Declaration:
    """AutoAWQ's GEMM layout; its other versions order bits differently."""
    version = reader.text("version", default="gemm").lower()
    if version != "gemm":
        reader.unsupported("version", version, "gemm")
    if reader.flag("zero_point") is False:
        reader.unsupported("zero_point", False, "true; AWQ without zero points has no published GEMM layout")
    base = Declared(method, reader.where, layout="awq", number="int", strategy="group")
    default = _int_settings(reader, base)
    if default.bits not in (None, 4):
        reader.unsupported("bits", default.bits, "4")
    return Declaration(default, rules=_left_alone(reader, default, "modules_to_not_convert"))


_AUTO_ROUND = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:llm_compressor": None,
    "auto_round:fp8_static": None,
}


def _auto_round(reader: _Reader, method: str) -> Declaration:
    """AutoRound: GPTQ's or AWQ's tensors under `packing_format`; `extra_config` sets single modules or patterns."""
    packing = reader.text("packing_format", default="auto_round:auto_gptq")
    if packing not in _AUTO_ROUND:
        reader.unsupported("packing_format", packing, ", ".join(sorted(_AUTO_ROUND)))
    if rotation := reader.get("rotation_config"):
        reader.unsupported("rotation_config", rotation, "none; rotated weights need the rotation at run time")
    layout = _AUTO_ROUND[packing]
    base = Declared("auto-round", reader.where, layout=layout)
    if layout is None:  # compressed-tensors' suffixes, which tell everything
        return Declaration(base)
    if (kind := reader.text("data_type", default="int")) != "int":
        reader.unsupported("data_type", kind, f"int in {packing}")
    default = _int_settings(reader, replace(base, number="int", strategy="group"))
    named: dict[str, Declared] = {}
    rules: list[tuple[Matches, Declared]] = []
    for name, inner in reader.objects("extra_config").items():
        bits = inner.integer("bits", low=1)
        if bits is not None and bits > 8:  # 16 or 32: not quantized
            declared = replace(default, is_quantized=False)
        else:
            declared = _int_settings(inner, default)
        named[name] = declared
        if re.search(r"[*+?\[\](){}^$|\\]", name):
            rules.append((_regex(reader, "extra_config", [name], anywhere=True), declared))
    return Declaration(default, named, tuple(rules))


def _bitsandbytes(reader: _Reader, method: str) -> Declaration:
    if reader.flag("load_in_4bit", "_load_in_4bit"):
        kind = reader.text("bnb_4bit_quant_type", default="fp4")
        if kind not in ("nf4", "fp4"):
            reader.unsupported("bnb_4bit_quant_type", kind, "nf4, fp4")
        default = Declared(method, reader.where, layout=kind, bits=4)
    elif reader.flag("load_in_8bit", "_load_in_8bit"):
        default = Declared(method, reader.where, layout="int8", bits=8, number="int", strategy="channel")
    else:
        reader.refuse("load_in_8bit", reader.get("load_in_8bit"), "load_in_8bit or load_in_4bit to be true")
    return Declaration(default, rules=_left_alone(reader, default, "llm_int8_skip_modules"))


def _hqq(reader: _Reader, method: str) -> Declaration:
    """HQQ: `quant_config` for all modules, or one per tag such as `self_attn.q_proj`."""

    def settings(inner: _Reader) -> Declared:
        for key in ("scale_quant_params", "zero_quant_params"):
            if inner.get(key):
                inner.unsupported(key, inner.get(key), "null; quantized scales are not served")
        weights = inner.object("weight_quant_params")
        if weights is None:
            inner.refuse("weight_quant_params", None, "an object")
        return Declared(method, reader.where, bits=weights.integer("nbits", allowed=(1, 2, 3, 4, 5, 6, 8)))

    plain = Declared(method, reader.where)
    rules = list(_left_alone(reader, plain, "skip_modules"))
    inner = reader.object("quant_config")
    if inner is None:
        return Declaration(plain, rules=tuple(rules))
    if "weight_quant_params" in inner.config:
        return Declaration(settings(inner), rules=tuple(rules))
    rules += [(_within([tag]), settings(tagged)) for tag, tagged in reader.objects("quant_config").items()]
    return Declaration(plain, rules=tuple(rules))


def _mxfp4(reader: _Reader, method: str) -> Declaration:
    declared = Declared(method, reader.where, bits=4, number="float", strategy="group", group_size=32)
    return Declaration(declared, rules=_left_alone(reader, declared, "modules_to_not_convert"))


_METHODS: dict[str, Callable[[_Reader, str], Declaration]] = {
    "auto-round": _auto_round,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "hqq": _hqq,
    "intel/auto-round": _auto_round,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mixed": _modelopt,
    "modelopt_mxfp8": _modelopt,
    "mxfp4": _mxfp4,
}
