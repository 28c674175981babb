"""Makes the golden files of this folder with the tools that publish each layout; see README.md.

python make.py TOOL, one of: compressed_tensors, compressed_tensors_old, llm_compressor, transformers, bitsandbytes,
gptqmodel, autoround, hqq, modelopt, aqlm
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(rows * 1000 + columns)
    return (torch.randn(rows, columns) * 0.1).to(dtype)


def save(case: str, tensors: dict[str, Tensor], expected: Tensor, quantization: dict[str, Any]) -> None:
    """Tensors by suffix, what the tool itself makes of them, and the declaration."""
    stored = {f"x.{suffix}": tensor.contiguous().clone() for suffix, tensor in tensors.items()}
    stored["expected"] = expected.detach().contiguous().clone()
    save_file(stored, HERE / f"{case}.safetensors", {"quantization_config": json.dumps(quantization)})
    print(case, {name: (str(t.dtype), tuple(t.shape)) for name, t in stored.items()})


def compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def ranges(wide: Tensor, args: Any) -> tuple[Tensor, Tensor]:
        rows, columns = wide.shape
        strategy = str(getattr(args.strategy, "value", args.strategy))
        if strategy == "tensor":
            return wide.min().reshape(1), wide.max().reshape(1)
        if strategy == "channel":
            return wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
        if strategy == "block":
            r, c = args.block_structure
            padded = torch.nn.functional.pad(wide, (0, -columns % c, 0, -rows % r))
            tiles = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c)
            return tiles.amin((1, 3)), tiles.amax((1, 3))
        grouped = wide.view(rows, columns // args.group_size, args.group_size)
        return grouped.amin(-1), grouped.amax(-1)

    def case(name: str, layout: str, wide: Tensor, **arguments: Any) -> None:
        args = QuantizationArgs(**{"symmetric": True, **arguments})
        low, high = ranges(wide.float(), args)
        state: dict[str, Tensor] = {"weight": wide}
        if layout == "nvfp4-pack-quantized":
            amax = wide.float().abs().max()
            state["weight_global_scale"] = (448.0 * 6.0 / amax).reshape(1)
            local = torch.maximum(low.abs(), high.abs()) / 6.0
            state["weight_scale"] = (
                (local * state["weight_global_scale"]).clamp(max=448).to(torch.float8_e4m3fn).float()
            )
        elif layout in ("mxfp4-pack-quantized", "mxfp8-quantized"):
            largest = 4.0 if "mxfp4" in layout else 256.0
            amax = torch.maximum(low.abs(), high.abs())
            state["weight_scale"] = 2.0 ** torch.floor(torch.log2(amax / largest))
        else:
            scale, zero = calculate_qparams(low, high, args)
            state["weight_scale"] = scale.to(wide.dtype)
            if not args.symmetric:
                state["weight_zero_point"] = zero.to(torch.int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        compressed = compressor.compress(copy.deepcopy(state), scheme)
        tensors = {suffix: tensor.data for suffix, tensor in compressed.items()}
        expected = compressor.decompress(copy.deepcopy(tensors), scheme)["weight"]
        declared = json.loads(args.model_dump_json(exclude_none=True))
        group = {"targets": ["Linear"], "weights": declared, "format": layout}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
        save(f"ct-{name}", tensors, expected, config)

    f32, bf16 = torch.float32, torch.bfloat16
    fp8 = {"num_bits": 8, "type": "float"}
    case("fp8-tensor", "float-quantized", weight(8, 64, bf16), **fp8, strategy="tensor")
    case("fp8-channel", "float-quantized", weight(8, 64, bf16), **fp8, strategy="channel")
    case("fp8-group", "float-quantized", weight(8, 64, f32), **fp8, strategy="group", group_size=16)
    case("fp8-block", "float-quantized", weight(20, 40, f32), **fp8, strategy="block", block_structure=[8, 16])
    int8 = {"num_bits": 8, "type": "int"}
    case("int8-channel", "int-quantized", weight(8, 64, bf16), **int8, strategy="channel")
    case("int8-tensor", "int-quantized", weight(8, 64, f32), **int8, strategy="tensor")
    case("int8-zero-point", "int-quantized", weight(8, 64, f32), **int8, strategy="channel", symmetric=False)
    for bits in (2, 3, 4, 8):
        grouped = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
        case(f"int{bits}-group", "pack-quantized", weight(10, 64, bf16), **grouped)
        case(f"int{bits}-asymmetric", "pack-quantized", weight(10, 64, f32) + 0.03, **grouped, symmetric=False)
        case(f"int{bits}-ragged", "pack-quantized", weight(10, 70, f32), num_bits=bits, type="int", strategy="channel")
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    case("nvfp4", "nvfp4-pack-quantized", weight(8, 64, f32), **nvfp4)
    case("mxfp4", "mxfp4-pack-quantized", weight(8, 64, f32), **{**nvfp4, "strategy": "group", "group_size": 32})
    case("mxfp8", "mxfp8-quantized", weight(8, 64, f32), **fp8, strategy="group", group_size=32)


def compressed_tensors_old() -> None:
    """What versions before 0.18 wrote and later ones cannot: `weight_g_idx`, and three bits ten to a word."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    compressor = BaseCompressor.load_from_registry("pack-quantized")
    for bits, is_symmetric, is_ordered in ((4, True, False), (4, False, False), (3, True, True), (3, False, True)):
        wide = weight(10, 64)
        order = torch.arange(64) if is_ordered else torch.randperm(64)
        grouped = wide[:, order].view(10, 4, 16)
        arguments = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16, "symmetric": is_symmetric}
        args = QuantizationArgs(**arguments, actorder=None if is_ordered else "group")
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        index = None if is_ordered else torch.empty(64, dtype=torch.int32)
        if index is not None:
            index[order] = torch.arange(64, dtype=torch.int32) // 16
        parts = compressor.compress_weight(wide, scale, args, zero, index)
        tensors = {**parts, "weight_scale": scale, **({} if index is None else {"weight_g_idx": index})}
        if is_symmetric:
            expected = compressor.decompress_weight(tensors, args)
        else:  # this version packs zero points and does not unpack them
            values = quantize(wide, scale, zero, args, dtype=torch.int8, g_idx=index)
            expected = dequantize(values, scale, zero, args, g_idx=index)
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json(exclude_none=True))}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
        kind = "symmetric" if is_symmetric else "asymmetric"
        save(f"ct-old-int{bits}-{kind}{'' if is_ordered else '-unordered'}", tensors, expected, config)


def llm_compressor() -> None:
    """One projection of the tiny model in ../smoothed, calibrated and saved, with the declaration that it wrote."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    def case(name: str, modifier: Any) -> None:
        torch.manual_seed(1)
        samples = [
            {"input_ids": torch.randint(3, 32, (32,)), "attention_mask": torch.ones(32).long()} for _ in range(8)
        ]
        model = AutoModelForCausalLM.from_pretrained(HERE.parent / "smoothed" / "base", dtype=torch.bfloat16)
        oneshot(model=model, recipe=modifier, dataset=DataLoader(samples), num_calibration_samples=8, max_seq_length=32)
        tensors, config = _exported(model.save_pretrained, "o_proj")
        group = config["config_groups"]["group_0"]
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        expected = compressor.decompress(copy.deepcopy(tensors), scheme)["weight"]
        save(f"llm-compressor-{name}", tensors, expected, config)

    spared = ["lm_head", "re:.*mlp.gate$"]
    case("fp8-static", QuantizationModifier(targets="Linear", scheme="FP8", ignore=spared))
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "actorder": "weight"}
    for name, is_symmetric in (("symmetric", True), ("asymmetric", False)):
        group = {"targets": ["Linear"], "weights": {**weights, "symmetric": is_symmetric}}
        case(f"gptq-int4-{name}", GPTQModifier(ignore=spared, config_groups={"group_0": group}))


def transformers() -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    block = (16, 32)
    wide = weight(40, 80)
    padded = torch.nn.functional.pad(wide, (0, -80 % 32, 0, -40 % 16))
    scale = padded.view(3, 16, 3, 32).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(16, 0)[:40].repeat_interleave(32, 1)[:, :80]
    values = (wide / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    for name, stored in (("f32", scale), ("bf16", scale.bfloat16()), ("e8m0", scale.to(torch.float8_e8m0fnu))):
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
        if name == "e8m0":
            config["scale_fmt"] = "ue8m0"
        expected = _dequantize_fp8_weight(values.clone(), stored.float(), list(block), torch.float32)
        save(f"fp8-block-{name}", {"weight": values, "weight_scale_inv": stored}, expected, config)

    # gpt-oss: two experts, gate and up interleaved; the class keeps the result transposed, [experts, in, 2 out].
    torch.manual_seed(5)
    blocks = torch.randint(0, 256, (2, 12, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 12, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save("gpt-oss-mxfp4", {"blocks": blocks, "scales": scales}, expected, {"quant_method": "mxfp4"})


def bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    for name, kind, nested, shape in (
        ("nf4", "nf4", False, (16, 64)),
        ("fp4", "fp4", False, (16, 64)),
        ("nf4-nested", "nf4", True, (48, 512)),
        ("fp4-nested", "fp4", True, (24, 128)),
        ("nf4-nested-ragged", "nf4", True, (20, 96)),
    ):
        packed, state = bnb.quantize_4bit(weight(*shape), blocksize=64, quant_type=kind, compress_statistics=nested)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        config["bnb_4bit_use_double_quant"] = nested
        tensors = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        expected = bnb.dequantize_4bit(packed, state)
        if shape[1] % 64:
            # The library's own CPU kernel (0.50.2) starts every row with a new block, which neither its quantizer nor
            # its CUDA kernels do; its portable implementation follows the format.
            from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            expected = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, 64, shape, torch.float32)
        save(f"bnb-{name}", tensors, expected, config)
    wide = weight(12, 64, torch.float16)
    codes, largest, _ = bnb.int8_vectorwise_quant(wide)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    save("bnb-int8", tensors, bnb.int8_vectorwise_dequant(codes, largest), config)


def _affine(wide: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points `[out, groups]` as GPTQ's quantizer finds them."""
    grouped = wide.float().view(wide.shape[0], -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    top = (1 << bits) - 1
    if symmetric:
        scale = 2 * torch.maximum(low.abs(), high.abs()) / top
        return scale, torch.full_like(scale, (top + 1) / 2)
    scale = (high - low) / top
    return scale, (-low / scale).round().clamp(1, top)


def gptqmodel() -> None:
    from types import SimpleNamespace

    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    group = 32
    versions = [(bits, sym, v) for bits in (2, 3, 4, 8) for sym in (True, False) for v in ("gptq", "gptq_v2")]
    cases = [(*case, case[2] == "gptq_v2" or case[1], "") for case in versions]
    cases += [(*case, False, "-unordered") for case in versions if case[0] == 4 and (case[2] == "gptq_v2" or case[1])]
    for bits, symmetric, version, is_ordered, more in cases:
        wide = weight(32, 64)
        layer = TorchLinear(
            bits=bits, group_size=group, sym=symmetric, desc_act=not is_ordered, in_features=64,
            out_features=32, bias=False, pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        index = torch.arange(64) // group if is_ordered else torch.randperm(64) // group
        order = torch.argsort(index, stable=True)
        scale, zero = _affine(wide[:, order], bits, group, symmetric)
        scale = scale.half().float()
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = wide.clone()
        layer.pack_original(linear, scale, zero, index.to(torch.int32))
        layer.post_init()
        expected = layer.dequantize_weight().t()  # half precision, [out, in]
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        config = {
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
            "desc_act": not is_ordered, "checkpoint_format": version,
        }  # fmt: skip
        kind = "symmetric" if symmetric else "asymmetric"
        save(f"{version.replace('_', '-')}-int{bits}-{kind}{more}", tensors, expected, config)
    wide = weight(32, 64)
    scale, zero = _affine(wide, 4, group, symmetric=False)
    scale = scale.half().float()
    layer = AwqTorchLinear(
        bits=4, group_size=group, sym=False, desc_act=False, in_features=64, out_features=32, bias=False,
        register_buffers=True,
    )  # fmt: skip
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = wide.clone()
    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    AwqGEMMLinear.pack(layer, linear, scale, zero)
    expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).t()
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    save("awq-int4", {n: getattr(layer, n) for n in ("qweight", "qzeros", "scales")}, expected, config)


def autoround() -> None:
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    for packing, module in (("auto_round:auto_gptq", qlinear_torch_zp), ("auto_round", qlinear_torch)):
        for bits in (2, 3, 4, 8):
            wide = weight(32, 64)
            symmetric = packing == "auto_round:auto_gptq"
            scale, zero = _affine(wide, bits, 32, symmetric)
            scale = scale.half().float()
            layer = module.QuantLinear(bits, 32, 64, 32, bias=False)
            linear = torch.nn.Linear(64, 32, bias=False)
            linear.weight.data = wide.clone()
            layer.device = "cpu"  # its `pack` reads an attribute that only its subclasses set
            layer.pack(linear, scale, zero, None)
            layer.post_init()
            # The layer has no method that expands it: its output for the unit vectors is the weight.
            expected = layer(torch.eye(64).half()).t()
            config = {
                "quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": symmetric, "data_type": "int",
                "packing_format": packing,
            }  # fmt: skip
            name = packing.replace("auto_round", "autoround").replace(":auto_gptq", "-gptq")
            save(f"{name}-int{bits}", {n: getattr(layer, n) for n in ("qweight", "qzeros", "scales")}, expected, config)

    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    for symmetric in (False, True):
        wide = weight(32, 64)
        scale, zero = _affine(wide, 4, 32, symmetric)
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = wide.clone()
        # As its exporter calls it: one zero point for all where the quantization is symmetric.
        zeros = int(zero.flatten()[0]) if symmetric else zero.t().contiguous()
        layer = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.t().contiguous(), zeros=zeros, device="cpu")
        expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).t()
        tensors = {n: getattr(layer, n) for n in ("qweight", "qzeros", "scales")}
        config = {
            "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": symmetric, "data_type": "int",
            "packing_format": "auto_round:auto_awq",
        }  # fmt: skip
        save(f"autoround-awq-int4{'-symmetric' if symmetric else ''}", tensors, expected, config)
    with torch.enable_grad():
        _autoround_export()


def _autoround_export() -> None:
    """One projection of a tiny Llama that the tool rounded and exported for AutoAWQ, symmetric as is its default."""
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    model = _tiny_llama(hidden_size=64, intermediate_size=64, head_dim=32)
    tokenizer = type("NoTokenizer", (), {"save_pretrained": lambda *_, **__: None, "name_or_path": ""})()
    rounder = AutoRound(
        model, tokenizer=tokenizer, bits=4, group_size=32, iters=0, disable_opt_rtn=True, device_map="cpu"
    )
    tensors, config = _exported(lambda folder: rounder.quantize_and_save(folder, format="auto_awq"), "k_proj")
    expected = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32).t()
    save("awq-int4-symmetric", tensors, expected, config)


def hqq() -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits, axis, group, shape in (
        (8, 1, 64, (16, 64)),
        (4, 1, 32, (16, 64)),
        (4, 0, 32, (64, 32)),
        (3, 1, 32, (16, 64)),
        (2, 1, 16, (16, 64)),
        (2, 0, 64, (64, 32)),
        (1, 1, 16, (16, 64)),
        (4, 1, 64, (16, 96)),
    ):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        linear.weight.data = weight(*shape)
        settings = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        layer = HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
        layer.encoded_state_dict = True
        tensors = {name: tensor for name, tensor in layer.state_dict().items() if tensor is not None}
        config = {"quant_method": "hqq", "quant_config": settings}
        ragged = "-ragged" if shape[1] % group and axis == 1 else ""
        save(f"hqq-int{bits}-axis{axis}{ragged}", tensors, layer.dequantize(), config)


def aqlm() -> None:
    from aqlm import QuantizedLinear
    from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data

    for books, bits, out_group, in_group, shape, dtype in (
        (1, 8, 1, 8, (11, 40), torch.float16),
        (1, 8, 1, 16, (24, 48), torch.float16),
        (2, 8, 1, 8, (19, 72), torch.float32),
        (1, 12, 1, 8, (16, 24), torch.float16),
        (2, 8, 2, 8, (10, 32), torch.float32),
        (3, 5, 1, 16, (16, 64), torch.float32),
    ):
        torch.manual_seed(shape[0] * 1000 + shape[1])
        layer = QuantizedLinear(shape[1], shape[0], in_group, out_group, books, bits, bias=False, dtype=dtype)
        layer.codes.data = pack_int_data(torch.randint(0, 2**bits, layer.codes.shape), bits)
        layer.codebooks.data = (torch.randn(layer.codebooks.shape) * 0.1).to(dtype)
        layer.scales.data = (torch.rand(layer.scales.shape) + 0.5).to(dtype)
        expected = _dequantize_weight(unpack_int_data(layer.codes, bits), layer.codebooks, layer.scales)
        sizes = {"num_codebooks": books, "nbits_per_codebook": bits}
        sizes |= {"out_group_size": out_group, "in_group_size": in_group}
        config = {"quant_method": "aqlm", **sizes, "linear_weights_not_to_quantize": ["lm_head.weight"]}
        save(f"aqlm-{books}x{bits}-{out_group}x{in_group}", dict(layer.state_dict()), expected, config)


def modelopt() -> None:
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    wide = weight(8, 64)
    packed, scale, second = NVFP4QTensor.quantize(wide, 16)
    expected = packed.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": second.reshape(())}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    save("modelopt-nvfp4", tensors, expected, config)

    scale = wide.view(8, 4, 16).abs().amax(-1) / 7
    codes = pack_int4_in_uint8(wide, scale, 16)
    columns = torch.rand(64) + 0.5
    signed = (wide / scale.repeat_interleave(16, 1)).round().clamp(-8, 7)  # the tool has no reader
    expected = signed * scale.repeat_interleave(16, 1) * columns
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 16}
    tensors = {"weight": codes, "weight_scale": scale, "pre_quant_scale": columns}
    save("modelopt-int4", tensors, expected, config)

    wide = weight(256, 130)[:, :128].contiguous()[:16].repeat(16, 1)
    packed, scale = FP8QTensor.quantize(wide, block_sizes={-1: 128, -2: 128})
    expected = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 128, -2: 128})
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    tensors = {"weight": packed._quantized_data, "weight_scale": scale.view(2, 1, 1, 1)}
    save("modelopt-fp8-block", tensors, expected.bfloat16(), config)
    with torch.enable_grad():
        _modelopt_export()


def _modelopt_export() -> None:
    """One projection of a tiny Llama that the tool calibrated and exported, with the declaration that it wrote."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor

    for name, recipe in (("fp8", mtq.FP8_DEFAULT_CFG), ("fp8-channel", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)):
        model = _tiny_llama(hidden_size=32, intermediate_size=48, head_dim=16).bfloat16()
        prompts = torch.randint(3, 64, (4, 16))
        mtq.quantize(model, recipe, lambda model, prompts=prompts: model(prompts))
        tensors, config = _exported(
            lambda folder, model=model: export_hf_checkpoint(model, export_dir=folder), "q_proj"
        )
        scale = tensors["weight_scale"]
        packed = FP8QTensor(tensors["weight"].shape, torch.float32, tensors["weight"])
        expected = packed.dequantize(torch.float32, scale=scale.view(-1, 1) if scale.dim() else scale)
        save(f"modelopt-{name}", tensors, expected, config)


def _tiny_llama(**sizes: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, **heads, **sizes, architectures=["LlamaForCausalLM"])
    return LlamaForCausalLM(config)


def _exported(export: Callable[[str], Any], projection: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by suffix of the first layer's projection, and the declaration, of a model that a tool writes."""
    with tempfile.TemporaryDirectory() as folder:
        export(folder)
        (written,) = Path(folder).rglob("config.json")  # AutoRound adds a folder of its own
        stored = load_file(written.with_name("model.safetensors"))
        config = json.loads(written.read_text())["quantization_config"]
    prefix = f"model.layers.0.self_attn.{projection}."
    return {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}, config


if __name__ == "__main__":
    with torch.no_grad():
        for tool in sys.argv[1:]:
            globals()[tool]()
