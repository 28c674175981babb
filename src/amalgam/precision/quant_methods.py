"""Every quantization method that a checkpoint may declare: its own words → `Declaration`.

In: a `Reader` over a `quantization_config`. Out: bits, groups and layout by module. An option that changes the meaning
of weights, or a value that nobody here understands, is refused. Must never know: tensors, layers, families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from amalgam.precision.declared import Declaration, Declared, Matches
from amalgam.precision.quant_reader import Reader, regex, wildcards, within


def _left_alone(reader: Reader, base: Declared, *keys: str) -> tuple[tuple[Matches, Declared], ...]:
    """The rule of a list of modules that are not quantized; `*` in an entry stands for any text."""
    entries = reader.names(*keys)
    spared = replace(base, is_quantized=False)
    rules: list[tuple[Matches, Declared]] = []
    if plain := [entry for entry in entries if "*" not in entry]:
        rules.append((within(plain), spared))
    if wild := [entry for entry in entries if "*" in entry]:
        rules.append((wildcards(wild), spared))
    return tuple(rules)


def _compressed_tensors(reader: Reader, method: str) -> Declaration:
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
            rules.append((regex(group, "targets", patterns), declared))
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
        rules.insert(0, (regex(reader, "ignore", patterns), spared))
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


def _quantization_args(weights: Reader, method: str, layout: str, whole: Reader) -> Declared:
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


def _pair(reader: Reader, key: str) -> tuple[int, int] | None:
    value = reader.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(part) for part in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(part) is int and part > 0 for part in value):
        reader.refuse(key, value, "two positive integers")
    return value[0], value[1]


def _fp8(reader: Reader, method: str) -> Declaration:
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


def _fbgemm_fp8(reader: Reader, method: str) -> Declaration:
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


def _modelopt(reader: Reader, method: str) -> Declaration:
    """NVIDIA ModelOpt: one `quant_algo`, or one per layer; exclusions are shell wildcards."""

    def algorithm(inner: Reader) -> Declared:
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


def _gptq(reader: Reader, method: str) -> Declaration:
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
        matches = regex(reader, "dynamic", [re.sub(r"^[+-]:", "", pattern)])
        rules.append((matches, replace(default, is_quantized=False) if is_skipped else _int_settings(inner, default)))
    if reader.flag("lm_head") is False:
        rules.append((lambda module: module == "lm_head", replace(default, is_quantized=False)))
    return Declaration(default, rules=tuple(rules))


def _int_settings(reader: Reader, base: Declared) -> Declared:
    """`base` with the bits, group size and symmetry that an object sets."""
    bits, group_size = reader.integer("bits", "w_bit", allowed=_WIDTHS), reader.group_size("group_size", "q_group_size")
    is_symmetric = reader.flag("sym")
    return replace(
        base,
        bits=base.bits if bits is None else bits,
        group_size=base.group_size if group_size is None else group_size,
        is_symmetric=base.is_symmetric if is_symmetric is None else is_symmetric,
    )


def _awq(reader: Reader, method: str) -> Declaration:
    """AutoAWQ's GEMM layout; its other versions order bits differently."""
    version = reader.text("version", default="gemm").lower()
    if version != "gemm":
        reader.unsupported("version", version, "gemm")
    # Without zero points AutoAWQ has no layout; AutoRound, symmetric by default, stores the middle as one.
    is_symmetric = True if reader.flag("zero_point") is False else None
    base = Declared(method, reader.where, layout="awq", number="int", strategy="group", is_symmetric=is_symmetric)
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


def _auto_round(reader: Reader, method: str) -> Declaration:
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
            rules.append((regex(reader, "extra_config", [name], anywhere=True), declared))
    return Declaration(default, named, tuple(rules))


def _bitsandbytes(reader: Reader, method: str) -> Declaration:
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


def _hqq(reader: Reader, method: str) -> Declaration:
    """HQQ: `quant_config` for all modules, or one per tag such as `self_attn.q_proj`."""

    def settings(inner: Reader) -> Declared:
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
    rules += [(within([tag]), settings(tagged)) for tag, tagged in reader.objects("quant_config").items()]
    return Declaration(plain, rules=tuple(rules))


def _mxfp4(reader: Reader, method: str) -> Declaration:
    declared = Declared(method, reader.where, bits=4, number="float", strategy="group", group_size=32)
    return Declaration(declared, rules=_left_alone(reader, declared, "modules_to_not_convert"))


METHODS: dict[str, Callable[[Reader, str], Declaration]] = {
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
