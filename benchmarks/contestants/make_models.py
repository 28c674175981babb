"""Shape S with one set of random weights for every engine: a transformers folder, and GGUF files of it.

make_models.py hf FOLDER               with torch and transformers
make_models.py tokenizer FOLDER        with tokenizers; one token for each ASCII character of a text
make_models.py gguf FOLDER FILE        with gguf, numpy and safetensors: bf16, norms and routers in float32
make_models.py random FOLDER FILE      the same with random codes in the types that `llama-quantize --dry-run` printed,
                                       read from the standard input: as fast as trained ones, and made in seconds
make_models.py quantize FILE FILE Q4_0 with llama-cpp-python; Q4_0 for every tensor that can take it
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 8, 32, 4, 128
EXPERTS, ACTIVE, WIDTH, VOCAB, POSITIONS = 64, 8, 768, 32000, 32768

# The scales (and minima) of random codes, in the order in which a block has them: values of a few hundredths.
_HALVES = {
    "Q4_1": (3e-3, -2.25e-2),
    "Q5_0": (1.5e-3,),
    "Q5_1": (1.5e-3, -2.3e-2),
    "Q4_K": (8e-5, 6e-4),
    "Q5_K": (4e-5, 6e-4),
    "Q6_K": (1.5e-5,),
    "IQ4_XS": (1.5e-5,),
}


def make_hf(folder: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=6144,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        moe_intermediate_size=WIDTH,
        max_position_embeddings=POSITIONS,
        rope_theta=1e6,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="2GB")


def vocabulary() -> list[str]:
    """The characters that stand for single bytes (GPT-2's), and names for all other tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    return tokens + [f"<tok{index}>" for index in range(VOCAB - 256)]


def make_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def random_blocks(kind: str, shape: Sequence[int]) -> Any:
    """uint8 `[..., bytes of a row]`: blocks of GGUF's type `kind`, for values of `shape`."""
    import numpy as np

    from amalgam.formats.gguf import FORMATS
    from amalgam.formats.gguf.blocks import GgufFormat

    (found,) = (one for one in FORMATS if isinstance(one, GgufFormat) and one.type.name == kind)
    size = found.type.num_bytes
    count = math.prod(shape) // found.type.num_elements
    blocks = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    for offset, value in zip(found.halves, _HALVES[kind], strict=True):
        blocks[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def make_random(folder: str, out: str) -> None:
    line = re.compile(r"\[ *\d+/ *\d+\] (\S+) .*-> .*\((\w+)\)$")
    found = [match for match in map(line.match, map(str.rstrip, sys.stdin)) if match]
    make_gguf(folder, out, {match[1]: match[2].upper() for match in found})


def make_gguf(folder: str, out: str, types: Mapping[str, str] | None = None) -> None:
    """Tensors named in `types` get random codes of that type."""
    import gguf
    import numpy as np
    import torch
    from safetensors import safe_open

    place = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors = safe_open(file, "pt")
        place |= dict.fromkeys(tensors.keys(), tensors)

    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(255)
    writer.add_eos_token_id(254)
    writer.add_add_bos_token(False)

    def add(name: str, *sources: str, is_wide: bool = False) -> None:
        if types and name in types:
            shape = place[sources[0]].get_slice(sources[0]).get_shape()
            codes = random_blocks(types[name], shape if len(sources) == 1 else [len(sources), *shape])
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType[types[name]])
            return
        loaded = [place[source].get_tensor(source) for source in sources]
        tensor = loaded[0] if len(loaded) == 1 else torch.stack(loaded)
        if is_wide:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint8).numpy().view(np.uint8)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight", is_wide=True)
    add("output.weight", "lm_head.weight")
    for layer in range(LAYERS):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        add(ours + "attn_norm.weight", theirs + "input_layernorm.weight", is_wide=True)
        add(ours + "ffn_norm.weight", theirs + "post_attention_layernorm.weight", is_wide=True)
        for part in ("q", "k", "v"):
            add(f"{ours}attn_{part}.weight", f"{theirs}self_attn.{part}_proj.weight")
        add(ours + "attn_output.weight", theirs + "self_attn.o_proj.weight")
        for part in ("q", "k"):
            add(f"{ours}attn_{part}_norm.weight", f"{theirs}self_attn.{part}_norm.weight", is_wide=True)
        add(ours + "ffn_gate_inp.weight", theirs + "mlp.gate.weight", is_wide=True)
        for part in ("gate", "up", "down"):
            names = [f"{theirs}mlp.experts.{expert}.{part}_proj.weight" for expert in range(EXPERTS)]
            add(f"{ours}ffn_{part}_exps.weight", *names)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: str, out: str, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    params.pure = kind == "Q4_0"  # otherwise some tensors become wider
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp did not quantize {source} to {kind}")


if __name__ == "__main__":
    makers = {
        "hf": make_hf,
        "tokenizer": make_tokenizer,
        "gguf": make_gguf,
        "random": make_random,
        "quantize": quantize,
    }
    makers[sys.argv[1]](*sys.argv[2:])
