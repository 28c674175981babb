"""`amalgam export --to gguf`: read back, the file holds the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from amalgam.checkpoint import TensorStore
from amalgam.checkpoint.gguf_writer import GgufWriter
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError, UnsupportedError
from amalgam.formats.gguf import blocks, k_quants
from amalgam.formats.gguf.carrying import Truth, choose, kinds_of, rows_of
from amalgam.formats.gguf.rounding import ROUNDED, round_to
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.text.gguf.metadata import build_tokenizer
from amalgam.text.gguf.writing import tokenizer_metadata
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.export.contract import ExportOptions, ExportReport
from amalgam.tools.export.exporting import export_model
from tests import gguf_probes
from tests.composition.test_gguf import CASES, FAMILIES, PROMPT, TOLERANCE, logits_of
from tests.errors import raises
from tests.models.gguf_writer import KIND, write_gguf
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

DEMO = Path(__file__).parents[2] / "models" / "demo"
VARIANTS = (
    *("llama_biases", "llama_rope_llama3", "mixtral_window", "deepseek_v2_groups", "gemma4_moe", "phi3_longrope"),
    *("granitemoe_shared", "granitemoe_hybrid", "granitemoe_hybrid_dense", "xverse_dense"),
)
# llama.cpp has one size of heads in delta nets, and indexers of 64 numbers and more.
SIZES: dict[str, dict[str, Any]] = {
    **{name: {"linear_value_head_dim": 16} for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe")},
    **{name: {"index_head_dim": 64} for name in ("deepseek_v32", "glm_moe_dsa")},
}
# What GGUF has no word for, and what llama.cpp would not load, or compute otherwise: family, changes, what is named.
REFUSED = {
    "another scale of scores": ("gemma2", {"query_pre_attn_scalar": 24}, "scale"),
    "a window that the architecture has no key for": ("dots1", {"sliding_window": 8}, "window"),
    "delta nets with heads of two sizes": ("qwen3_next", {"linear_value_head_dim": 24}, "delta nets"),
    "limits of queries": ("olmoe", {"clip_qkv": 0.5}, "clip_qkv"),
    "biases": ("seed_oss", {"attention_out_bias": True}, "attn_output.bias"),
    "heads of an indexer that have no Hadamard matrix": ("deepseek_v32", {"index_head_dim": 96}, "not 96"),
    "rates of delta nets without a bound": ("bailing_hybrid", {"kda_safe_gate": False}, "kda_safe_gate"),
    "experts in every other layer": ("ernie4_5_moe", {"moe_layer_interval": 2, "num_hidden_layers": 4}, "every layer"),
}
FORMATS = {block.type.name: block for block in (*blocks.FORMATS, *k_quants.FORMATS)}


PLAIN = ExportOptions()


def export(base: Path, out: Path, options: ExportOptions = PLAIN, **mixed: Any) -> ExportReport:
    model = {"base_path": str(base), "mixed_precision": mixed}
    return export_model(Settings(model=model, inference={"dtype": "float32"}), "gguf", out, options)


@pytest.mark.parametrize("case", [*(name for name in FAMILIES if name != "xverse"), *VARIANTS])
def test_read_back_it_computes_the_same(case: str, tmp_path: Path) -> None:
    family, changes, _ = CASES[case]
    save_tiny(FAMILIES[family], tmp_path / "hf", **changes, **SIZES.get(case, {}))
    report = export(tmp_path / "hf", tmp_path / "out")
    assert all(change.is_exact for change in report.changes)
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tmp_path / "hf"), atol=TOLERANCE, rtol=0)


def test_limits_of_experts_by_layer(tmp_path: Path) -> None:
    """Ling 3's, which its class passes over."""
    save_tiny(FAMILIES["bailing_hybrid"], tmp_path / "hf")
    unlimited = logits_of(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    limits = {"expert_swiglu_limit_list": [0, 0.02, 0.1], "share_expert_swiglu_limit_list": [0, None, 0.03]}
    file.write_text(json.dumps(json.loads(file.read_text()) | limits))
    export(tmp_path / "hf", tmp_path / "out")
    found = logits_of(tmp_path / "out")
    torch.testing.assert_close(found, logits_of(tmp_path / "hf"), atol=TOLERANCE, rtol=0)
    assert (found - unlimited).abs().max() > 0.1


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    family, changes, named = REFUSED[case]
    save_tiny(FAMILIES[family], tmp_path / "hf", **changes)
    with raises(UnsupportedError, named):
        export(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_computes_otherwise_for_some_texts_is_told(tmp_path: Path) -> None:
    save_tiny(FAMILIES["mistral"], tmp_path / "hf")
    report = export(tmp_path / "hf", tmp_path / "out")
    assert any("8 tokens" in note for note in report.notes)


@pytest.mark.parametrize("option", [{"share": "none"}, {"type": "Q9_9"}])
def test_options_without_a_meaning(option: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with raises(ConfigError, *option.values()):
        export(folder / "hf", tmp_path / "out", ExportOptions(**option))


def test_a_family_that_llama_cpp_has_not(tmp_path: Path) -> None:
    save_tiny(FAMILIES["xverse"], tmp_path / "hf")  # with experts
    with raises(UnsupportedError, "xverse"):
        export(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "kind"), [("mixtral", KIND.Q4_0), ("qwen3_moe", KIND.Q5_1), ("gpt_oss", KIND.MXFP4)]
)
def test_a_gguf_file_comes_back_byte_for_byte(family: str, kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """Also where rows are in another order, and of stacks."""
    save_tiny(FAMILIES[family], tmp_path / "hf")
    first = write_gguf(tmp_path / "hf", tmp_path / "first.gguf", kind)
    report = export(first, tmp_path / "out")
    assert report.changes == ()
    before, after = TensorStore.open(first), TensorStore.open(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)
    num_quantized = sum(entry.encoding == kind.name for entry in after.values())
    assert num_quantized > 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in several precisions."""
    root = tmp_path_factory.mktemp("mixed")
    save_tiny(FAMILIES["qwen3_moe"], root / "hf", torch.bfloat16)
    made = {"int8": QuantizeOptions(), "int4": QuantizeOptions(group_size=32), "fp8": QuantizeOptions()}
    for name, options in made.items():
        quantize_checkpoint(str(root / "hf"), root / name, name, options)
    return root


class TestMixed:
    def test_experts_of_a_layer_share_the_type_that_holds_all_of_them(self, folder: Path, tmp_path: Path) -> None:
        sources = {name: str(folder / name) for name in ("int8", "int4")}
        rules = {
            "*.experts.{0,1}.*": "int8",
            "*.experts.{2-7}.*": "int4",
            "model.layers.0.*.experts.*.up_proj.*": "int4",
        }
        report = export(folder / "hf", tmp_path / "out", sources=sources, weight_mapping=rules)
        store = TensorStore.open(tmp_path / "out")
        assert store["blk.0.ffn_gate_exps.weight"].encoding == "Q8_0"
        assert store["blk.0.ffn_up_exps.weight"].encoding == "Q4_0"
        widened = [change for change in report.changes if change.before == "int4" and change.after == "Q8_0"]
        assert {change.reason for change in widened} == {"llama.cpp has one type for all experts of a layer"}
        assert all(change.bytes_after > change.bytes_before for change in widened)
        assert len(widened) == 6 * (2 + 3 * (len({name.split(".")[1] for name in store if name.startswith("blk")}) - 1))

    def test_the_narrowest_instead(self, folder: Path, tmp_path: Path) -> None:
        sources, rules = {"int4": str(folder / "int4")}, {"*.experts.{2-7}.*": "int4"}
        options = ExportOptions(share="narrowest")
        report = export(folder / "hf", tmp_path / "out", options, sources=sources, weight_mapping=rules)
        assert TensorStore.open(tmp_path / "out")["blk.1.ffn_up_exps.weight"].encoding == "Q4_0"
        rounded = {change.name for change in report.changes if not change.is_exact}
        assert any(".experts.0." in name for name in rounded)

    @pytest.mark.parametrize(("wish", "expected"), [(None, "Q8_0"), ("Q5_0", "Q5_0"), ("Q4_K", "Q8_0")])
    def test_what_has_no_exact_type(self, wish: str | None, expected: str, folder: Path, tmp_path: Path) -> None:
        """Blocks of 256 do not divide rows of 64: the wish is not honoured there, which the report shows."""
        sources, rules = {"fp8": str(folder / "fp8")}, {"*.self_attn.o_proj.weight": "fp8"}
        options = ExportOptions(type=wish)
        report = export(folder / "hf", tmp_path / "out", options, sources=sources, weight_mapping=rules)
        assert {change.after for change in report.changes} == {expected}
        assert not any(change.is_exact for change in report.changes)

    def test_every_weight_is_what_the_plan_has(self, folder: Path, tmp_path: Path) -> None:
        """int4 stays what it is beside int8, whose float32 scales are rounded."""
        sources = {name: str(folder / name) for name in ("int8", "int4")}
        mixed = {"sources": sources, "weight_mapping": {"*.experts.{0-3}.*": "int8", "*.experts.{4-7}.*": "int4"}}
        report = export(folder / "hf", tmp_path / "out", **mixed)
        assert {(change.before, change.is_exact) for change in report.changes} == {("int8", False), ("int4", True)}
        settings = Settings(model={"base_path": str(folder / "hf"), "mixed_precision": mixed})
        _, plan = load_model(folder / "hf", mixed=settings.model.mixed_precision)
        decoder, exported = load_model(tmp_path / "out")
        for slot, origin in plan.origins.items():
            one, other = (version[slot].dequantize(torch.float32) for version in (plan, exported))
            torch.testing.assert_close(one, other, rtol=2.0**-10 if origin.format == "int8" else 0, atol=0)
        assert Runner(decoder, exported).step({0: PROMPT})[0].isfinite().all()


def test_blocks_move_with_the_heads_that_they_are_of(tmp_path: Path) -> None:
    """llama.cpp has the value heads of Qwen3.5's delta nets in another order: rows of some weights, inputs of one."""
    heads = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    save_tiny(FAMILIES["qwen3_5"], tmp_path / "hf", torch.bfloat16, **heads)
    quantize_checkpoint(str(tmp_path / "hf"), tmp_path / "int4", "int4", QuantizeOptions(group_size=32))
    report = export(tmp_path / "int4", tmp_path / "out")
    assert all(change.is_exact for change in report.changes)
    assert TensorStore.open(tmp_path / "out")["blk.0.ssm_out.weight"].encoding == "Q4_0"
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tmp_path / "int4"), atol=TOLERANCE, rtol=0)


def test_keys_of_latent_attention_are_rounded_anew(tmp_path: Path) -> None:
    """llama.cpp has them the other way round, so that no block stays what it is; values stay."""
    sizes = {"qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32}
    save_tiny(FAMILIES["deepseek_v3"], tmp_path / "hf", torch.bfloat16, **sizes)
    quantize_checkpoint(str(tmp_path / "hf"), tmp_path / "int4", "int4", QuantizeOptions(group_size=32))
    report = export(tmp_path / "int4", tmp_path / "out")
    assert {(change.name.split(".")[-2], change.after) for change in report.changes if not change.is_exact} == {
        ("kv_b_proj", "Q8_0")
    }
    store = TensorStore.open(tmp_path / "out")
    assert (store["blk.0.attn_k_b.weight"].encoding, store["blk.0.attn_v_b.weight"].encoding) == ("Q8_0", "Q4_0")
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(tmp_path / "int4"), atol=0.05, rtol=0)


class TestTypes:
    @pytest.mark.parametrize("kind", ROUNDED)
    def test_blocks_are_those_of_the_gguf_package(self, kind: str) -> None:
        values = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)) * 0.02
        values[1], values[2, :256], values[3, 5] = 0, 0.01, 3.0
        made = round_to(values, kind)
        theirs = KIND[kind]
        expanded = FORMATS[kind].expand(made)
        assert torch.equal(expanded, torch.from_numpy(gguf.quants.dequantize(made.numpy(), theirs)))
        if not kind.endswith("_K"):  # which the package does not round to
            assert (gguf.quants.quantize(values.numpy(), theirs) == made.numpy()).all()
        ordinary = torch.cat((values[:1], values[4:]))
        error = (torch.cat((expanded[:1], expanded[4:])) - ordinary).norm() / ordinary.norm()
        bits = FORMATS[kind].type.num_bytes * 8 / FORMATS[kind].type.num_elements
        assert error < 2.6 * 2.0 ** -(bits - 0.5)

    @pytest.mark.parametrize(
        ("name", "options", "kind", "truth"),
        [
            ("int4", QuantizeOptions(group_size=32), "Q4_0", Truth.EXACT),
            ("int4", QuantizeOptions(group_size=128), "Q4_0", Truth.EXACT),
            ("int4", QuantizeOptions(group_size=32, has_zero_points=True), "Q5_0", Truth.EXACT),
            ("int8", QuantizeOptions(group_size=32), "Q8_0", Truth.SCALES),  # which are float32
            ("int8", QuantizeOptions(), "Q8_0", Truth.SCALES),
            ("mxfp4", QuantizeOptions(), "MXFP4", Truth.EXACT),
        ],
    )
    def test_what_carries_over(self, name: str, options: QuantizeOptions, kind: str, truth: Truth) -> None:
        values = torch.randn(16, 256, generator=torch.Generator().manual_seed(2)).bfloat16() * 0.02
        weight = _packed(name, values, options)
        kinds = kinds_of(weight)
        assert kinds[kind] is truth
        assert choose([kinds], ["F16"]) == kind
        expected = weight.dequantize(torch.float32)
        for each, found in kinds.items():
            tolerance = 0 if found is Truth.EXACT else 2.0**-10 * float(expected.abs().max())
            expanded = FORMATS[each].expand(rows_of(weight, each))
            torch.testing.assert_close(expanded, expected, atol=tolerance, rtol=0)

    def test_scales_that_are_no_float16(self) -> None:
        values = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)) * 0.02
        weight = _packed("int4", values, QuantizeOptions(group_size=32))
        parts = {**weight.parts, "scale": weight.parts["scale"].float() * 1.0001}
        odd = PackedWeight(weight.layout, weight.shape, parts, weight.block)
        assert kinds_of(odd)["Q4_0"] is Truth.SCALES
        torch.testing.assert_close(
            FORMATS["Q4_0"].expand(rows_of(odd, "Q4_0")), odd.dequantize(torch.float32), rtol=2.0**-10, atol=0
        )

    @pytest.mark.parametrize(
        ("kinds", "fallbacks", "expected"),
        [
            ([{"Q4_0": 0, "Q8_0": 0}, {"Q8_0": 0}], ["F16"] * 2, "Q8_0"),
            ([{"Q4_0": 0, "Q8_0": 0}, {"BF16": 0}], ["F16"] * 2, "BF16"),
            ([{"F16": 0}, {"BF16": 0}], ["F16"] * 2, "F32"),
            ([{"Q4_K": 0}, {"Q6_K": 0}], ["F16"] * 2, "Q8_0"),
            ([{"Q4_0": 0, "Q5_0": 0, "Q8_0": 0}, {"MXFP4": 0, "Q5_0": 0, "Q8_0": 0}], ["F16"] * 2, "Q5_0"),
            ([{}, {"Q4_0": 0, "Q8_0": 0}], ["Q8_0"] * 2, "Q8_0"),
        ],
    )
    def test_what_several_share(self, kinds: list[dict[str, int]], fallbacks: list[str], expected: str) -> None:
        truths: list[Mapping[str, Truth]] = [{kind: Truth(value) for kind, value in each.items()} for each in kinds]
        assert choose(truths, fallbacks) == expected


def _packed(name: str, values: torch.Tensor, options: QuantizeOptions) -> PackedWeight:
    made = writable_format(name)
    return made.pack(quantize(values, made, round_to_nearest, options))


class TestTokenizer:
    @pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-4o", "deepseek-v3", "tekken", "smollm", "gemma4"])
    def test_a_name_is_found_by_what_it_does(self, pre: str) -> None:
        metadata = gguf_probes.metadata(pre)
        wrapped, ends = build_tokenizer(metadata, "model.gguf")
        found = tokenizer_metadata(wrapped, ends, len(metadata["tokenizer.ggml.tokens"]), "model.gguf")
        assert found.num_differing == 0
        again, ends_again = build_tokenizer(found.keys, "model.gguf")
        for text in gguf_probes.TEXTS:
            assert again.backend_tokenizer.encode(text).ids == wrapped.backend_tokenizer.encode(text).ids
        assert ends_again == ends

    def test_the_demo_talks_out_of_its_file(self, tmp_path: Path) -> None:
        report = export(DEMO, tmp_path / "out")
        assert any("1 of 8 texts" in note for note in report.notes)  # contractions in upper case
        store = TensorStore.open(tmp_path / "out")
        ours, theirs = Tokenizer.load(tmp_path / "out", store.metadata), Tokenizer.load(DEMO)
        messages = [{"role": "user", "content": "The quick brown fox, 明月几时有？ 1234\n"}]
        assert ours.encode_chat(messages) == theirs.encode_chat(messages)
        assert ours.eos_token_ids == theirs.eos_token_ids
        assert store.metadata["general.sampling.top_k"] == 50
        assert gguf.GGUFReader(tmp_path / "out" / "model.gguf").get_field("general.architecture") is not None


def test_a_tensor_may_be_begun_anew(tmp_path: Path) -> None:
    """What a failed attempt has written is gone, and the header has room for what is known last."""
    writer = GgufWriter(tmp_path / "x.gguf", {"general.architecture": "llama", "n": 0}, {"a": 2, "b": 1})
    values = torch.randn(4, 32)

    def failing() -> Any:
        yield values[:2]
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - ours
        writer.add("a", (4, 32), "F32", failing())
    writer.add("a", (4, 32), "Q8_0", [rows_of(dense(values), "Q8_0")])
    writer.add("b", (3,), "F32", [torch.arange(3.0)])
    writer.finish({"general.architecture": "llama", "n": 7})
    store = TensorStore.open(tmp_path / "x.gguf")
    assert (store.metadata["n"], store["a"].encoding) == (7, "Q8_0")
    assert torch.equal(store.read("b"), torch.arange(3.0))
    assert torch.equal(FORMATS["Q8_0"].expand(store.read("a")), FORMATS["Q8_0"].expand(round_to(values, "Q8_0")))
