"""The parts of the docs that the code itself describes: settings, formats, families.

In: nothing. Out: Markdown. `python -m amalgam.tools.document` writes the files of the checkout that it belongs to,
whatever the current folder; a test compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from amalgam.base.files import writing
from amalgam.config.environment import NATIVE_ISA_VARIABLE, NATIVE_ISAS
from amalgam.config.keys import all_settings
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError
from amalgam.formats.contract import WeightFormat, WritableFormat
from amalgam.formats.gguf.config import ARCHITECTURES
from amalgam.formats.registry import all_formats
from amalgam.kernels.layouts import TRITON_LAYOUTS
from amalgam.kernels.weights import Layout
from amalgam.models.registry import all_families
from amalgam.text.gguf.pretokenizers import PRE_TOKENIZERS

_INTRODUCTION = f"""# Configuration

One YAML file (`--config`), environment variables and flags, in rising order of precedence. A flag is the key itself:
`--inference.max_seq_length 2048`; `--model` is short for `--model.base_path`, and `--host`, `--port`, `--api-key`,
`--root-path` and `--metrics-compat` are short for settings of the server, `--speculation` and
`--draft` for `speculation.kind` and `speculation.draft`. `amalgam serve` takes flags of
[vLLM and llama-server](serving.md#coming-from-vllm-or-llama-server) too. `--source NAME=FOLDER` and
`--map PATTERN=SOURCE` add a source and a rule to the file's; a source of the same name takes the place of the file's.
`--map PATTERN=SOURCE@DEVICE` and `--device NAME=MEMORY` place [experts on devices](gpu/placement.md).
Unknown keys are errors. `amalgam config` checks a configuration and shows each setting's value and where it comes from.

**Types are those below, in the file too**; nothing is guessed. Text is taken as it is (`--host ::`, `--model 2024`,
`name: no`, a `#` in a path given as a flag), integers are decimal (`010` is 10, `1:30` and `0x10` are errors), and
`true`, `yes`, `on`, `1` and `false`, `no`, `off`, `0` are booleans. `none`, `null` or nothing at all is none, where
none is allowed. Lists and mappings are JSON or YAML; a list of texts may be written `a,b`.

**A flag holds whatever its value is**: `--statistics.file ""` and `--engine.num_threads null` undo what the file says.
**An empty variable** (`AMALGAM_STATISTICS_FILE=`) does the same where the default is none; any other is as if it were
not set. In the file, a section or setting with nothing behind it has its default, if that is none.

**Other people's variables.** What Kubernetes sets for its services (`AMALGAM_PORT=tcp://…`, `AMALGAM_SERVICE_HOST`,
and `AMALGAM_SERVER_PORT=tcp://…` for one called `amalgam-server`) is ignored, and so is any `AMALGAM_…` that is like no
setting; one line of the log names them. One that is almost a setting's name is an error.

**Paths.** Relative model paths in the file start at the file's folder; all other relative paths, and those of flags and
variables, at the working directory. `~` is the home folder everywhere.

Every `<name>_path` under `mixed_precision` declares a
source called `<name>`; `base` is `base_path`. A pattern matches whole logical names: `*` any characters, `?` one,
`[abc]` one of them, `{{a,b}}` alternatives, `{{0-15}}` whole numbers. An exact name wins, then the pattern with more
literal characters, then the later rule, then `default_source`. `amalgam plan --explain NAME` says which and why.
A pattern that matches no weight is refused, and so is an alternative: `{{0,99}}` for a model with 16 experts. Of the
numbers of a range, one has to match: `{{0-127}}` is every expert.

Web pages can send requests to whatever the browser's machine can reach. So on a loopback address (`127.0.0.1`,
`localhost`, `::1`) the Host header must be a name of this machine or in `server.allowed_hosts`, where the name goes
under which a proxy in front is asked; on other addresses any Host is taken unless there are entries. Pages of other
origins are refused everywhere but for `server.allowed_origins`. Programs that send no Origin are not concerned.

A request that leaves a sampling parameter out gets the model's: from `generation_config.json` of `base_path`, or the
`general.sampling.*` keys of a GGUF file. Where these say nothing, ours hold (`temperature` 0.7, `top_p` 0.9, `top_k`
50, `max_new_tokens` 512). A request that names `temperature`, `top_p`, `top_k` or `min_p` is sampled, also where the
model says `do_sample: false`. `min_new_tokens` of the file is our `min_tokens`, and `stop_strings` our `stop`. What
the file says beyond that, or out of range, is told in one line of the log.
`GET /model_info` shows all of it as `sampling_defaults`, and `/docs` the values that hold.

`{NATIVE_ISA_VARIABLE}` ({", ".join(NATIVE_ISAS)}) makes the native kernels use a lower instruction set than the
processor has. `avx512` is AVX-512 with VNNI and BF16, `avx512_vnni` without BF16 (Cascade Lake, Ice Lake). `amx` needs
a Linux that lets the process use its tiles; where it does not, `avx512` runs. `amx_emulated` is for tests: the code of
`amx` on any machine, a thousand times slower.
"""

_SUPPORT = """# What is read, and how it runs

Any mix of these formats, in any layer, down to one projection of one expert. Checkpoints: safetensors (sharded or not,
experts one by one or fused), PyTorch `.bin`, GGUF. Whatever is not listed is refused by name.

*native*: in the extension, in the bytes that are published or hardly more. *expanded*: dequantized at every use and
multiplied by PyTorch. *Triton*: dequantized inside the product, on GPUs of compute capability 8.0 and above, with
`amalgam-llm[gpu]` ([gpu/kernels.md](gpu/kernels.md); not measured on a card); elsewhere expanded. *either*: not with
scales that differ from input to input (HQQ's axis 0) and, on a CPU, groups of unequal sizes. AQLM is native where a
vector belongs to one row and to a multiple of 8 inputs; with vectors of several rows it is expanded. `moe` runs
natively where all experts of the layer do; otherwise expert by expert. Routers are float32 whatever they are stored in;
norms, biases and sinks must be floating. With AVX2 or AVX-512, bf16 is kept in 12 bits a weight, without loss, where
its exponents allow it (`inference.bf16_coding`). `GET /manifest` tells each weight's `layout` on the machine at hand:
those in `panels_…`, `panels_bf16_coded` among them, run natively.

**Sources have to compute in one basis.** Rotations (QuaRot, SpinQuant), factors that a tool moves from one weight into
the next (AWQ, SmoothQuant), experts, heads or channels in another order leave a model what it is, but none of its
weights can stand beside another version's then. So what two sources of a plan share is compared: norms, biases and
routers whole, embeddings, heads, projections and experts by rows that a hash chooses. A plan that would mix two bases
is refused with what has to come from one source; a block, an expert or a pair that comes whole from one may be in a
basis of its own. Not told are differences smaller than rounding's own (a light fine-tune beside 4 bits), an expert of
another model that comes whole behind the same router, and, in models of thousands of experts that are each put together
from two sources, a few that differ: 192 of them are compared, at least two in each layer. A source that lacks
embedding, norms and routers is compared by the weights that it has.

**A declaration is read whole.** `quantization_config`, `quantize_config.json`, `quant_config.json` and
`hf_quant_config.json` may hold, at any depth, what their tool writes; a key that is not known here is refused by name,
unless its value says nothing (null, false, empty). So are weights that need a rotation of their inputs at run time
(`rotation`, `rotation_config`, `hadamard_config`, `transform_config`, `spinquant_config` …): use a checkpoint that was
quantized without. Of FP8, scales that multiply (DeepSeek, Qwen) and that divide (GPTQModel's
`weight_scale_semantics: inverse`) are served.

The last group of a row may be shorter than the others (GPTQ with groups of 128 and 192 inputs). Biases of zeros beside
projections that have none in the model, as GPTQ's tools write them, are passed over; others are refused. Mixtral's
experts may have the names of other families (`mlp.experts.N.gate_proj`), as llm-compressor publishes them.
"""
_FAMILIES = """## Families

Each is proven against its Hugging Face class in float32 (XVERSE against an independent float64 implementation). Rotary
positions: default, linear, dynamic, llama3, yarn, longrope, proportional. Sliding windows and a head tied to the
embedding where the config has them. Each field of a config.json means what the class makes of it, and has its default
where it is missing; what the class could not follow either is refused.

Where the Hugging Face classes look at the longest sequence of a batch, a table here holds for all requests: *dynamic*
serves up to `max_position_embeddings`, where it equals the default, and refuses longer sequences; *longrope* takes its
long factors for every token if `inference.max_seq_length` is above `original_max_position_embeddings`, and its short
ones otherwise.

DeepSeek-V3.2 and GLM-5 attend to the `index_topk` positions (2048 as published) that an indexer chooses, and to all
where there are no more. Its keys are cached beside the latent vectors, in the cache's type. Of equal scores, whose
order the classes leave open, the earlier position is chosen. The indexer's weights stay in the precision that they
are stored in.
Kimi K2 is `DeepseekV3ForCausalLM`; its tokenizer is read from tiktoken's file, see [text](text.md).

In most of their layers Qwen3-Next, Qwen3.5 and Ling 3 (delta nets), Granite 4 (Mamba-2) and LFM2 (short convolutions)
have a recurrent state: `engine.state_cache_bytes` is its room, and a prefix is shared up to where a state has been
kept. They are no drafts ([speculation.md](speculation.md)). Qwen's GGUF files have heads and projections in another
order than the published checkpoints, so that one is no source beside the other. Of the models whose `model_type` is
`bailing_hybrid` Ling 3 is served; Ling 2.5 and Ring 2.5 have another linear attention.

Gemma 4's layers may share keys and values, and may have an embedding of their own: such models are quantized with
texts as others are, but what each projection does to the loss is not measured (`amalgam plan`). Tokens of images, which
attend in both directions there, do not come up.

Of multimodal checkpoints (`…ForConditionalGeneration` below) the text part is served; what sees images or hears, and
layers that predict further tokens, are left out. `Mistral3ForConditionalGeneration` holds Mistral, Ministral 3 or
Mistral 4, as its `text_config.model_type` says.
"""
_GGUF = """## GGUF

A `.gguf` file alone is a model: configuration and tokenizer come from its metadata. A `config.json` or `tokenizer.json`
in its folder takes their place if the folder is named instead of the file.

- **Architectures**: {architectures}.
- **Numbers** have llama.cpp's defaults: `rope.scaling.factor` without a type is linear. A key of the architecture that
  would change what is computed and is not understood is refused by name. DeepSeek files without
  `expert_group_count` (converters until autumn 2025) work for V2, V3, R1, Moonlight and Kimi K2, which are known by
  their size; of others the published `config.json` has to be there. Files of Mistral 4 do not say how much queries
  grow beyond the trained length: as much as published, where llama.cpp lets them be.
- **Tokenizers** `gpt2`, `gemma4` and `llama`. `tokenizer.ggml.pre` may be {names}. Where llama.cpp differs from the
  published `tokenizer.json`, the latter counts: Unicode's form NFC for {normalized}; the published expressions
  of GPT-4o's kind, Kimi K2, Cohere and others, which llama.cpp comes near to with `std::regex`.
- **An answer ends** where it does in llama.cpp: at the ids that the file names (eos, eot, eom, fim_pad, fim_rep,
  fim_sep) and at tokens known by their text (`<|im_end|>`, `<|eot_id|>`, `<|endoftext|>` …). Texts that can stand in an
  answer, such as `</s>`, count only if the file marks the token as special.
- **Activations** are multiplied as they are. llama.cpp rounds them to 8 bits for quantized weights, so that its logits
  differ from those of the same file by more than a unit in places; with the file's weights in float32 it agrees.

## What `quantize` takes along

Besides the weights: layers for multi-token prediction and tied heads as they are, tokenizer, chat templates, generation
defaults, licence; from a GGUF file the tokenizer, its template and the ends of an answer as files. What it leaves out
(scales of a KV cache, draft layers of a GGUF file, other files) and what else changes in `config.json` it says, with
`--json` in full.
"""


def configuration() -> str:
    """Every setting: `docs/configuration.md`."""
    sections = [_INTRODUCTION]
    settings = all_settings()
    for name, section in Settings.model_fields.items():
        rows = [
            f"## {name}",
            "",
            section.description or "",
            "",
            "| key | type | default | meaning | environment |",
            "|---|---|---|---|---|",
        ]
        for info in settings:
            if info.key.startswith(f"{name}."):
                kind, meaning = (text.replace("|", "\\|") for text in (info.kind, " ".join(info.description.split())))
                default = "required" if info.is_required else _default(info.default)
                rows.append(f"| `{info.key}` | {kind} | {default} | {meaning} | `{info.environment}` |")
        sections.append("\n".join(rows) + "\n")
    return "\n".join(sections)


def _default(value: Any) -> str:
    if value is None or value in ("", (), {}):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _how_run(weight_format: WeightFormat, how: str, layouts: Collection[Layout]) -> str:
    """How a format's weights are multiplied where those of some layouts are multiplied as they are."""
    found = [layout in layouts for layout in weight_format.layouts]
    return how if all(found) else "either" if any(found) else "expanded"


def support() -> str:
    """What is read, and how it runs: `docs/support.md`."""
    operations = ("linear", "moe", "embedding")
    lines = [_SUPPORT, "| format | published by | `quantize` makes it | in memory |"]
    lines[-1] += "".join(f" {operation}, CPU |" for operation in operations) + " all three, GPU |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for weight_format in sorted(all_formats(), key=lambda f: (not f.is_wide, f.name)):
        methods = ", ".join(sorted(weight_format.methods)) or ("GGUF" if "gguf" in weight_format.name else "–")
        cpu = _how_run(weight_format, "native", {layout for layout in weight_format.layouts if layout.panels})
        gpu = _how_run(weight_format, "Triton", TRITON_LAYOUTS)
        makes = "yes" if isinstance(weight_format, WritableFormat) else "–"
        layouts = ", ".join(layout.name for layout in weight_format.layouts)
        cells = [weight_format.name, methods, makes, layouts, *[cpu] * len(operations)]
        lines.append(f"| {' | '.join(cells)} | {gpu} |")
    lines += ["", _FAMILIES, "| family | architectures | attention | experts | other |", "|---|---|---|---|---|"]
    for family in all_families():
        names = {name.removeprefix("layers.{}.") for name in family.names}
        has = _features(names)
        fused = "fused tensors read too" if family.fused else ""
        cells = [", ".join(has[column]) or "–" for column in ("attention", "experts")]
        other = ", ".join(filter(None, [*has["other"], fused])) or "–"
        lines.append(f"| {family.name} | {', '.join(family.architectures)} | {' | '.join(cells)} | {other} |")
    lists = {
        "architectures": sorted(ARCHITECTURES),
        "names": sorted(PRE_TOKENIZERS),
        "normalized": sorted(name for name, pre_tokenizer in PRE_TOKENIZERS.items() if pre_tokenizer.normalizes),
    }
    lines += ["", _GGUF.format(**{key: ", ".join(f"`{name}`" for name in values) for key, values in lists.items()})]
    return "\n".join(lines)


def _features(slots: set[str]) -> dict[str, list[str]]:
    """What a family's slots say about it."""
    known = {
        "attention": {
            "attention.q": "q, k, v apart",
            "attention.qkv": "q, k, v in one",
            "attention.kv_b": "latent (MLA)",
            "attention.q_norm": "norms on q and k",
            "attention.sinks": "sinks",
            "attention.b": "delta nets",
            "attention.skip": "Mamba-2",
            "attention.bcx": "short convolutions",
        },
        "experts": {
            "mlp.experts.{}.gate": "routed",
            "mlp.shared.gate": "shared",
            "mlp.shared_gate": "gate on the shared",
            "mlp.router_correction": "correction bias",
            "mlp.router_bias": "router bias",
            "mlp.experts.{}.gate_bias": "biases",
        },
        "other": {
            "mlp.gate": "dense MLP layers",
            "mlp.gate_up": "gate and up in one",
            "mlp.up": "",
            "attention_post_norm": "norms behind the blocks",
            "inputs.gate": "an embedding for each layer",
            "attention_norm_bias": "LayerNorm",
            "positions": "learned positions",
            "head_bias": "head bias",
        },
    }
    return {column: [text for slot, text in rows.items() if slot in slots and text] for column, rows in known.items()}


FILES = {Path("docs/configuration.md"): configuration, Path("docs/support.md"): support}

CHECKOUT = Path(__file__).resolve().parents[3]


def write_files(root: Path) -> None:
    """All of `FILES`, in a checkout.

    Raises:
        CheckpointError: one cannot be written, as where `root` is none.
    """
    for path, render in FILES.items():
        with writing(root / path):
            (root / path).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    try:
        write_files(CHECKOUT)
    except CheckpointError as error:
        sys.exit(f"Error: {error}")
