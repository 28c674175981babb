"""Every quantization method that a checkpoint may declare: its own words → `Declaration`.

In: a `Reader` over a `quantization_config`. Out: bits, groups and layout by module. An option that changes the meaning
of weights, or a value that nobody here understands, is refused; keys that no method asks for and that are not in
`quant_keys` are the reader's to refuse. Must never know: tensors, layers, families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from amalgam.formats.declared import keys as quant_keys
from amalgam.formats.declared.compressed_tensors import ARGUMENTS, compressed_tensors, config_group
from amalgam.formats.declared.reader import Reader, regex, wildcards, within
from amalgam.formats.declared.values import Codebooks, Declaration, Declared, Matches


def _left_alone(reader: Reader, base: Declared, *keys: str) -> tuple[tuple[Matches, Declared], ...]:
    """The rule of a list of modules that are not quantized; `*` in an entry stands for any text."""
    entries = [entry for key in keys for entry in reader.names(key)]
    spared = replace(base, is_quantized=False)
    rules: list[tuple[Matches, Declared]] = []
    if plain := [entry for entry in entries if "*" not in entry]:
        rules.append((within(plain), spared))
    if wild := [entry for entry in entries if "*" in entry]:
        rules.append((wildcards(wild), spared))
    return tuple(rules)


# One type under the names that tools give it.
_E4M3 = ("e4m3", "e4m3fn", "float8_e4m3fn", "fp8", "float8_e4m3")
_SCALE_METHODS = {"tensor": "tensor", "row": "channel", "block": "block"}


def _fp8(reader: Reader, method: str) -> Declaration:
    """DeepSeek's and Qwen's blocks, the older scale per tensor, and GPTQModel's, whose scales are divisors."""
    for key in ("fmt", "format", "checkpoint_format"):
        if (fmt := reader.text(key, default="e4m3").lower()) not in _E4M3:
            reader.unsupported(key, fmt, ", ".join(_E4M3))
    if (expert := reader.get("expert_dtype")) not in (None, "fp8"):
        reader.unsupported("expert_dtype", expert, "fp8")
    reader.choice("bits", allowed=(8,))
    reader.pass_over(quant_keys.WORDS | {"data_type", "packing_format", "modules_to_convert"})
    layout = reader.text("scale_fmt", default="float")
    if layout not in ("float", "ue8m0"):
        reader.unsupported("scale_fmt", layout, "float, ue8m0")
    default = _fp8_settings(reader, Declared(method, reader.where, layout=layout, bits=8, number="float"))
    named, rules = _exceptions(reader, default, _fp8_settings)
    rules = (*rules, *_left_alone(reader, default, "modules_to_not_convert", "ignored_layers"))
    return Declaration(default, named, rules)


def _fp8_settings(reader: Reader, base: Declared) -> Declared:
    """`base` with the blocks and the direction of scales that an object sets."""
    block = reader.pair("weight_block_size")
    kind = reader.get("weight_scale_method")
    if kind not in (None, *_SCALE_METHODS):
        reader.unsupported("weight_scale_method", kind, ", ".join(_SCALE_METHODS))
    if (kind == "block" and block is None) or (kind not in (None, "block") and block is not None):
        reader.refuse("weight_block_size", block, f"two positive integers for blocks alone, not for {kind}")
    if (meaning := reader.get("weight_scale_semantics")) not in (None, "inverse"):
        reader.unsupported("weight_scale_semantics", meaning, "inverse")
    strategy = _SCALE_METHODS[kind] if kind else "block" if block else base.strategy
    return replace(
        base,
        strategy=strategy,
        block=block if strategy == "block" and block else base.block if strategy == "block" else None,
        divides_by_scale=base.divides_by_scale or meaning is not None,
    )


def _exceptions(
    reader: Reader, default: Declared, settings: Callable[[Reader, Declared], Declared]
) -> tuple[dict[str, Declared], tuple[tuple[Matches, Declared], ...]]:
    """What single modules and patterns declare: AutoRound's `extra_config`, GPTQModel's `dynamic` and `lm_head`.

    Args:
        settings: an object and what holds elsewhere → what it makes of that.
    """
    named: dict[str, Declared] = {}
    rules: list[tuple[Matches, Declared]] = []
    for pattern, inner in reader.objects("dynamic").items():
        inner.pass_over(quant_keys.WORDS)
        is_skipped = pattern.startswith("-:")
        matches = regex(reader, "dynamic", [re.sub(r"^[+-]:", "", pattern)])
        rules.append((matches, replace(default, is_quantized=False) if is_skipped else settings(inner, default)))
    for name, inner in reader.objects("extra_config").items():
        inner.pass_over(quant_keys.WORDS)
        bits = inner.int("bits", default=None, low=1)
        if bits is not None and bits > 8:  # 16 or 32: not quantized
            inner.pass_over({"data_type"})
            declared = replace(default, is_quantized=False)
        else:
            declared = settings(inner, default)
        named[name] = declared
        if re.search(r"[*+?\[\](){}^$|\\]", name):
            rules.append((regex(reader, "extra_config", [name], anywhere=True), declared))
    if reader.bool("lm_head", default=None) is False:
        rules.append((lambda module: module == "lm_head", replace(default, is_quantized=False)))
    return named, tuple(rules)


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
        if inner.bool("has_zero_point", default=None):
            inner.unsupported("has_zero_point", True, "false")
        inner.pass_over({"pre_quant_scale"})  # each weight that has one says so
        group_size = inner.group_size("group_size")
        return (
            declared if declared.strategy != "group" or group_size is None else replace(declared, group_size=group_size)
        )

    plain = Declared("modelopt", reader.where)
    rules = _left_alone(reader, plain, "exclude_modules", "ignore")
    layers = {
        name: replace(algorithm(inner), is_quantized=True) for name, inner in reader.objects("quantized_layers").items()
    }
    kind = reader.text("quant_algo", default="").upper()  # none: only the cache is quantized
    default = plain if kind in ("", "MIXED_PRECISION") else algorithm(reader)
    for group in reader.objects("config_groups").values():
        _compare_group(group, default)
    return Declaration(default, layers, rules)


def _compare_group(group: Reader, default: Declared) -> None:
    """ModelOpt says in compressed-tensors' words what `quant_algo` and `quantized_layers` say: the same, that is."""
    weights, _, _ = config_group(group, "dense")
    group.pass_over({"pre_quant_scale", "quant_algo"})
    if group.bool("has_zero_point", default=None):
        group.unsupported("has_zero_point", True, "false")
    if weights is None:
        return
    weights.pass_over(ARGUMENTS)
    for key, declared in (("num_bits", default.bits), ("type", default.number)):
        value = weights.get(key)
        if None not in (value, declared) and value != declared:
            weights.refuse(key, value, f"{declared}, as quant_algo {default.layout} says")


_WIDTHS = (2, 3, 4, 8)


def _gptq(reader: Reader, method: str) -> Declaration:
    """GPTQ (AutoGPTQ, GPTQModel); `dynamic` maps a pattern to other settings, with `-:` to none."""
    layout = reader.text("checkpoint_format", "format", default="gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        reader.unsupported("checkpoint_format", layout, "gptq, gptq_v2")
    if reader.bool("is_marlin_format", default=None):
        reader.unsupported("is_marlin_format", True, "false")
    _refuse_other_words(reader)
    base = Declared(method, reader.where, layout=layout, number="int", strategy="group")
    default = _int_settings(reader, base)
    named, rules = _exceptions(reader, default, _int_settings)
    return Declaration(default, named, rules)


def _refuse_other_words(reader: Reader) -> None:
    if (packed := reader.get("pack_dtype")) not in (None, "int32"):
        reader.unsupported("pack_dtype", packed, "int32")
    if (kind := reader.text("data_type", default="int")) != "int":
        reader.unsupported("data_type", kind, "int")


def _int_settings(reader: Reader, base: Declared) -> Declared:
    """`base` with the bits, group size, symmetry and order that an object sets."""
    bits, group_size = reader.choice("bits", "w_bit", allowed=_WIDTHS), reader.group_size("group_size", "q_group_size")
    is_symmetric, is_reordered = reader.bool("sym", default=None), reader.bool("desc_act", default=None)
    _refuse_other_words(reader)
    return replace(
        base,
        bits=base.bits if bits is None else bits,
        group_size=base.group_size if group_size is None else group_size,
        is_symmetric=base.is_symmetric if is_symmetric is None else is_symmetric,
        is_reordered=base.is_reordered if is_reordered is None else is_reordered,
    )


def _awq(reader: Reader, method: str) -> Declaration:
    """AutoAWQ's GEMM layout (AutoAWQ, GPTQModel, AutoRound); its other versions order bits differently."""
    version = reader.text("version", "format", "checkpoint_format", default="gemm").lower()
    if version != "gemm":
        reader.unsupported("version", version, "gemm")
    if reader.get("backend") == "llm-awq":
        reader.unsupported("backend", "llm-awq", "autoawq; llm-awq packs weights in an order of its own")
    # Without zero points AutoAWQ has no layout; AutoRound, symmetric by default, stores the middle as one.
    is_symmetric = True if reader.bool("zero_point", default=None) is False else None
    base = Declared(method, reader.where, layout="awq", number="int", strategy="group", is_symmetric=is_symmetric)
    default = _awq_settings(reader, base)
    named, rules = _exceptions(reader, default, _awq_settings)
    rules = (*rules, *_left_alone(reader, default, "modules_to_not_convert"))
    return Declaration(default, named, rules)


def _awq_settings(reader: Reader, base: Declared) -> Declared:
    settings = _int_settings(reader, base)
    if settings.bits not in (None, 4):
        reader.unsupported("bits", settings.bits, "4")
    if settings.is_reordered:
        reader.unsupported("desc_act", True, "false; AWQ's groups have no index")
    if reader.bool("zero_point", default=None) is False:
        settings = replace(settings, is_symmetric=True)
    return settings


_AUTO_ROUND = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_round:llm_compressor": None,
    "auto_round:fp8_static": None,
}


def _auto_round(reader: Reader, method: str) -> Declaration:
    """AutoRound: GPTQ's or AWQ's tensors under `packing_format`; `extra_config` sets single modules or patterns."""
    packing = reader.text("packing_format", default=_packing_of_backend(reader))
    if packing not in _AUTO_ROUND:
        reader.unsupported("packing_format", packing, ", ".join(sorted(_AUTO_ROUND)))
    layout = _AUTO_ROUND[packing]
    base = Declared("auto-round", reader.where, layout=layout)
    if layout is None:  # compressed-tensors' suffixes, which tell everything but the bits
        if (fmt := reader.text("fmt", default="e4m3").lower()) not in _E4M3:
            reader.unsupported("fmt", fmt, ", ".join(_E4M3))
        reader.pass_over(quant_keys.WORDS)
        settings = _suffix_settings
    else:
        base = replace(base, number="int", strategy="group")
        settings = _awq_settings if layout == "awq" else _int_settings
    default = settings(reader, base)
    named, rules = _exceptions(reader, default, settings)
    rules = (*rules, *_left_alone(reader, default, "modules_to_not_convert"))
    return Declaration(default, named, rules)


def _packing_of_backend(reader: Reader) -> str:
    """What versions before 0.6 said instead of `packing_format`: `auto_round:exllamav2`, `autoround:auto_gptq:marlin`.

    Only their own kernels, exllamav2 and triton, store zero points as they are.
    """
    backend = re.sub("^auto-?round", "auto_round", reader.text("backend", default="").lower())
    if "awq" in backend:
        return "auto_round:auto_awq"
    if re.match("auto_round:(exllamav2|triton)", backend):
        return "auto_round"
    if "gptq" not in backend and backend not in ("", "auto"):
        reader.unsupported("backend", backend, "one that names gptq, awq, auto_round:exllamav2 or auto_round:triton")
    return "auto_round:auto_gptq"


def _suffix_settings(reader: Reader, base: Declared) -> Declared:
    """`base` with the bits and the kind of values that an object sets."""
    bits, kind = reader.int("bits", default=None, low=1), reader.text("data_type", default="")
    number = base.number
    if kind:
        if not kind.startswith(("int", "fp", "float", "mx_fp", "nv_fp", "mxfp", "nvfp")) or "e5m2" in kind:
            reader.unsupported("data_type", kind, "int, fp, mx_fp, nv_fp")
        number = "int" if kind.startswith("int") else "float"
    return replace(base, bits=base.bits if bits is None else bits, number=number)


def _bitsandbytes(reader: Reader, method: str) -> Declaration:
    reader.pass_over(quant_keys.BITSANDBYTES)
    if reader.bool("load_in_4bit", "_load_in_4bit", default=None):
        kind = reader.text("bnb_4bit_quant_type", default="fp4")
        if kind not in ("nf4", "fp4"):
            reader.unsupported("bnb_4bit_quant_type", kind, "nf4, fp4")
        default = Declared(method, reader.where, layout=kind, bits=4)
    elif reader.bool("load_in_8bit", "_load_in_8bit", default=None):
        default = Declared(method, reader.where, layout="int8", bits=8, number="int", strategy="channel")
    else:
        reader.refuse("load_in_8bit", reader.get("load_in_8bit"), "load_in_8bit or load_in_4bit to be true")
    return Declaration(default, rules=_left_alone(reader, default, "llm_int8_skip_modules"))


def _hqq(reader: Reader, method: str) -> Declaration:
    """HQQ: `quant_config` for all modules, or one per tag such as `self_attn.q_proj`."""

    def settings(inner: Reader) -> Declared:
        for key in ("scale_quant_params", "zero_quant_params", "quant_scale", "quant_zero"):
            if inner.get(key):
                inner.unsupported(key, inner.get(key), "null; quantized scales are not served")
        weights = inner.object("weight_quant_params")
        weights.pass_over(quant_keys.HQQ_WEIGHTS)
        return Declared(method, reader.where, bits=weights.choice("nbits", allowed=(1, 2, 3, 4, 5, 6, 8)))

    plain = Declared(method, reader.where)
    rules = list(_left_alone(reader, plain, "skip_modules"))
    config = reader.get("quant_config")
    if isinstance(config, Mapping) and "weight_quant_params" in config:
        inner = reader.object("quant_config", default=None)
        assert inner is not None
        return Declaration(settings(inner), rules=tuple(rules))
    rules += [(within([tag]), settings(tagged)) for tag, tagged in reader.objects("quant_config").items()]
    return Declaration(plain, rules=tuple(rules))


def _aqlm(reader: Reader, method: str) -> Declaration:
    """AQLM: the same codebooks' sizes for all modules, with the defaults of transformers' `AqlmConfig`."""
    codebooks = Codebooks(
        number=reader.int("num_codebooks", default=1, low=1),
        bits=reader.int("nbits_per_codebook", default=16, low=1, high=16),
        rows=reader.int("out_group_size", default=1, low=1),
        columns=reader.int("in_group_size", default=8, low=1),
    )
    declared = Declared(method, reader.where, codebooks=codebooks)
    return Declaration(declared, rules=_left_alone(reader, declared, "linear_weights_not_to_quantize"))


def _mxfp4(reader: Reader, method: str) -> Declaration:
    declared = Declared(method, reader.where, bits=4, number="float", strategy="group", group_size=32)
    return Declaration(declared, rules=_left_alone(reader, declared, "modules_to_not_convert"))


METHODS: dict[str, Callable[[Reader, str], Declaration]] = {
    "aqlm": _aqlm,
    "auto-round": _auto_round,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": compressed_tensors,
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
