"""What llm-compressor and others declare: compressed-tensors' words → `Declaration`.

See `methods.py`.
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.formats.declared.reader import Reader, regex
from amalgam.formats.declared.values import Declaration, Declared, Matches


def compressed_tensors(reader: Reader, method: str) -> Declaration:
    """https://github.com/vllm-project/compressed-tensors: config_groups with targets, and an ignore list."""
    reader.pass_over({"version"})
    if reader.values.get("transform_config") == {"config_groups": {}}:
        reader.pass_over({"transform_config"})
    _refuse_sparsity(reader)
    if (flavor := reader.get("fp8_dtype_flavor")) not in (None, "float8_e4m3fn", "float8_e5m2"):
        reader.unsupported(
            "fp8_dtype_flavor", flavor, "float8_e4m3fn, float8_e5m2; the same bits mean half as much in others"
        )
    layout = reader.text("format", default="dense")
    default = Declared(method, reader.where)
    named: dict[str, Declared] = {}
    rules: list[tuple[Matches, Declared]] = []
    by_class: dict[str, Declared] = {}
    for group in reader.objects("config_groups").values():
        weights, targets, layout_of_group = config_group(group, layout)
        if weights is None:
            continue
        declared = _quantization_args(weights, method, layout_of_group, reader)
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


def _refuse_sparsity(reader: Reader) -> None:
    sparsity = reader.object("sparsity_config", default=None)
    if sparsity is not None:
        if (kind := sparsity.get("format")) not in (None, "dense"):
            sparsity.unsupported("format", kind, "dense")
        # Of dense weights these describe where the zeros are.
        sparsity.pass_over({"targets", "ignore", "global_sparsity", "sparsity_structure", "registry_requires_subclass"})
    experts = reader.object("moe_sparsity_config", default=None)
    if experts is not None:
        if (kind := experts.get("method")) != "prune":
            experts.unsupported("method", kind, "prune; experts that were replaced by constants are not served")
        experts.pass_over({"num_experts"})  # the shapes of routers tell


def config_group(group: Reader, layout: str) -> tuple[Reader | None, list[str], str]:
    """Of a config group what holds for its weights, its targets and its layout."""
    for key in ("input_activations", "output_activations"):
        arguments = group.object(key, default=None)
        if arguments is not None:
            arguments.pass_over(ARGUMENTS)
    return group.object("weights", default=None), group.names("targets"), group.text("format", default=layout)


# compressed-tensors' QuantizationArgs, which for activations say only how another engine rounds them.
ARGUMENTS = frozenset(
    {
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
        *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
)
_LAYOUTS = {
    "dense": None,
    "mixed-precision": None,
    "naive-quantized": None,
    "int-quantized": "int-quantized",
    "float-quantized": "float-quantized",
    "float-quantized-e5m2": "float-quantized",  # ours: compressed-tensors has no word for it
    "pack-quantized": "pack-quantized",
    "nvfp4-pack-quantized": "nvfp4-pack-quantized",
    "mxfp4-pack-quantized": "mxfp4-pack-quantized",
    "mxfp8-quantized": "mxfp8-quantized",
}
_STRATEGIES = {"tensor": "tensor", "channel": "channel", "group": "group", "tensor_group": "group", "block": "block"}


def _quantization_args(weights: Reader, method: str, layout: str, whole: Reader) -> Declared:
    if layout not in _LAYOUTS:
        whole.unsupported("format", layout, ", ".join(sorted(_LAYOUTS)))
    group_size = weights.group_size("group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy not in _STRATEGIES:
        weights.unsupported("strategy", strategy, ", ".join(_STRATEGIES))
    if weights.get("dynamic") not in (None, False):
        weights.unsupported("dynamic", weights.get("dynamic"), "false for weights")
    order = weights.get("actorder")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        weights.unsupported("actorder", order, "weight, static, group, dynamic")
    return Declared(
        method,
        whole.where,
        layout=_LAYOUTS[layout],
        bits=weights.int("num_bits", default=None, low=1),
        number=weights.text("type", default="int"),
        strategy=_STRATEGIES[strategy],
        group_size=group_size,
        block=weights.pair("block_structure"),
        is_symmetric=weights.bool("symmetric", default=None),
        is_reordered=order in (True, "group", "dynamic"),
    )
