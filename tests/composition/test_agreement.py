"""Sources that are right by themselves and wrong together are refused; what belongs together is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amalgam.checkpoint.store import TensorStore
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition import tied_head
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.model import MixedPrecisionSettings
from amalgam.errors import CheckpointError, PlanError
from amalgam.formats.grid import QuantizeOptions
from amalgam.models.families.qwen3_moe import FAMILY
from tests.errors import raises
from tests.models.harness import Runner, load_model
from tests.models.tiny import save_tiny

LAYER = "model.layers.0"
NORM, INPUT_NORM = f"{LAYER}.post_attention_layernorm.weight", f"{LAYER}.input_layernorm.weight"
EXPERTS = f"{LAYER}.mlp.experts"
HEAD_DIM = 32
PROMPT = [5, 9, 200, 31, 77, 140]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny(FAMILY, folder)
    return folder


def factors(size: int) -> Tensor:
    """As a smoothing tool finds them: around 1, far from equal."""
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(0)))


def fold_norm(tensors: dict[str, Tensor]) -> None:
    """SmoothQuant over one norm, and what AWQ does first."""
    scale = factors(tensors[NORM].shape[0])
    tensors[NORM] /= scale
    for name, tensor in tensors.items():
        if (name.startswith(EXPERTS) and not name.endswith("down_proj.weight")) or name == f"{LAYER}.mlp.gate.weight":
            tensor *= scale


def fold_pair(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    """AWQ over two projections."""

    def fold(tensors: dict[str, Tensor]) -> None:
        scale = factors(tensors[first].shape[0])
        tensors[first] /= scale[:, None]
        # Heads that share a value share its factors.
        heads = scale.view(-1, HEAD_DIM).repeat_interleave(tensors[second].shape[1] // len(scale), dim=0).flatten()
        tensors[second] *= heads

    return fold


def train_on(tensors: dict[str, Tensor]) -> None:
    """Another model of the same shape."""
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def changed(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(base, folder)
    store = TensorStore.open(folder)
    tensors = {name: store.read(name).clone() for name in store}
    change(tensors)
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, tensors.items())
    return folder


def logits(base: Path, other: Path | None = None, mapping: Mapping[str, str] | None = None) -> Tensor:
    mixed = MixedPrecisionSettings(sources={} if other is None else {"other": str(other)}, weight_mapping=mapping or {})
    return Runner(*load_model(base, mixed=mixed)).step({0: PROMPT})[0]


def distance(found: Tensor, expected: Tensor) -> float:
    """As a share of the expected."""
    return float((found - expected).norm() / expected.norm())


UP_DOWN = fold_pair(f"{EXPERTS}.3.up_proj.weight", f"{EXPERTS}.3.down_proj.weight")
VALUE_OUT = fold_pair(f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.self_attn.o_proj.weight")


@pytest.mark.parametrize(
    ("fold", "together", "apart", "named"),
    [
        (fold_norm, [f"{LAYER}.mlp.*", NORM], [f"{EXPERTS}.*"], NORM),
        (fold_norm, [f"{LAYER}.mlp.*", NORM], [f"{EXPERTS}.5.gate_proj.weight"], NORM),
        (fold_norm, [f"{LAYER}.mlp.*", NORM], [NORM], NORM),
        (UP_DOWN, [f"{EXPERTS}.3.*"], [f"{EXPERTS}.3.down_proj.weight"], f"{EXPERTS}.3.up_proj.weight"),
        (UP_DOWN, [f"{EXPERTS}.3.*"], [f"{EXPERTS}.3.up_proj.weight"], f"{EXPERTS}.3.up_proj.weight"),
        (VALUE_OUT, [f"{LAYER}.self_attn.*"], [f"{LAYER}.self_attn.o_proj.weight"], f"{LAYER}.self_attn.v_proj.weight"),
    ],
)
def test_moved_scales(
    base: Path,
    tmp_path: Path,
    fold: Callable[[dict[str, Tensor]], None],
    together: list[str],
    apart: list[str],
    named: str,
) -> None:
    other = changed(base, tmp_path / "other", fold)
    expected = logits(base)
    torch.testing.assert_close(logits(other), expected, atol=1e-4, rtol=1e-4)  # the same function, elsewhere
    mixed = logits(base, other, dict.fromkeys(together, "other"))
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    with raises(PlanError, named, "'other'"):
        logits(base, other, dict.fromkeys(apart, "other"))


def test_another_training(base: Path, tmp_path: Path) -> None:
    other = changed(base, tmp_path / "other", train_on)
    with raises(PlanError, "base", "other"):
        logits(base, other, {f"{EXPERTS}.*": "other"})


@pytest.mark.parametrize(("target", "error"), [("fp8", 0.03), ("int8", 0.01), ("int4", 0.15)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_disagreement(base: Path, tmp_path: Path, target: str, error: float, dtype: torch.dtype) -> None:
    """Norms cast to 16 bits, every pair split between the sources."""

    def cast(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    narrow = changed(base, tmp_path / "narrow", cast)
    options = QuantizeOptions(group_size=16) if target == "int4" else QuantizeOptions()
    quantize_checkpoint(str(narrow), tmp_path / "other", target, options)
    mapping = {
        f"{EXPERTS}.*.down_proj.weight": "other",
        "model.layers.1.self_attn.v_proj.weight": "other",
        NORM: "other",
    }
    assert 0 < distance(logits(base, tmp_path / "other", mapping), logits(base)) < error


def in_row(row: int) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[row, 3] += 1e-3
        return weight

    return change


@pytest.mark.parametrize("chunk", [2**22, 1000])
@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda weight: weight * 2, lambda weight: weight[:100], in_row(7), in_row(255)],
)
def test_a_tied_config_beside_a_head_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], chunk: int
) -> None:
    monkeypatch.setattr(tied_head, "CHUNK_BYTES", chunk)
    folder = tmp_path / "tied"
    save_tiny(FAMILY, folder, tie_word_embeddings=True)
    expected = logits(folder)

    def add(head: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: tensors.update({"lm_head.weight": head(tensors["model.embed_tokens.weight"])})

    assert torch.equal(logits(changed(folder, tmp_path / "twice", add(torch.clone))), expected)
    with raises(CheckpointError, "lm_head.weight"):
        logits(changed(folder, tmp_path / "other", add(change)))


@pytest.mark.parametrize(("dtype", "is_equal"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_tied_head_of_another_type(tmp_path: Path, dtype: torch.dtype, is_equal: bool) -> None:
    """The same values are the same head in any type; one that was rounded apart from the embedding is not."""
    folder = tmp_path / "tied"
    save_tiny(FAMILY, folder, tie_word_embeddings=True)

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(dtype)

    def add(tensors: dict[str, Tensor]) -> None:
        cast(tensors)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(torch.bfloat16).float()

    other = changed(folder, tmp_path / "other", add)
    if is_equal:
        assert torch.equal(logits(other), logits(changed(folder, tmp_path / "tied alone", cast)))
    else:
        with raises(CheckpointError, "lm_head.weight"):
            logits(other)


def test_an_untied_config_without_a_head_says_what_to_do(base: Path, tmp_path: Path) -> None:
    def behead(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]

    other = changed(base, tmp_path / "other", behead)
    with raises(PlanError, "tie_word_embeddings"):
        logits(other)


def keep_experts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts." not in name]:
        del tensors[name]


@pytest.mark.parametrize("fold", [fold_norm, lambda tensors: exchange_experts(tensors, 2, 5)])
def test_a_source_of_experts_alone_is_compared_by_them(
    base: Path, tmp_path: Path, fold: Callable[[dict[str, Tensor]], None]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        fold(tensors)
        keep_experts(tensors)

    other = changed(base, tmp_path / "other", change)
    with raises(PlanError, "other"):
        logits(base, other, {f"{EXPERTS}.*": "other"})


def exchange_experts(tensors: dict[str, Tensor], one: int, other: int) -> None:
    for part in ("gate", "up", "down"):
        names = [f"{EXPERTS}.{expert}.{part}_proj.weight" for expert in (one, other)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def test_a_source_without_norms_is_taken(base: Path, tmp_path: Path) -> None:
    other = changed(base, tmp_path / "other", keep_experts)
    torch.testing.assert_close(logits(base, other, {f"{EXPERTS}.*": "other"}), logits(base))


SMOOTHED = Path(__file__).parents[1] / "data" / "smoothed"  # its README tells which tool moved which scales where


def smoothed_logits(name: str, other: str | None = None, *mapped: str) -> Tensor:
    tensors = load_file(SMOOTHED / "expected.safetensors")
    mixed = MixedPrecisionSettings(
        sources={} if other is None else {"other": str(SMOOTHED / other)}, weight_mapping=dict.fromkeys(mapped, "other")
    )
    return Runner(*load_model(SMOOTHED / name, mixed=mixed)).step({0: tensors["prompt"].tolist()})[0]


@pytest.mark.parametrize("name", ["base", "awq", "awq-pairs", "smoothquant", "smoothquant-experts"])
def test_a_smoothed_checkpoint_alone_equals_its_own_expansion(name: str) -> None:
    """The Hugging Face class over the weights as compressed-tensors expands them."""
    expected = load_file(SMOOTHED / "expected.safetensors")[name]
    torch.testing.assert_close(smoothed_logits(name), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "mapped", "moved"),
    [
        ("awq", f"{EXPERTS}.*", NORM),
        ("awq", f"{EXPERTS}.2.down_proj.weight", "up_proj.weight"),
        ("awq", f"{LAYER}.self_attn.q_proj.weight", INPUT_NORM),
        ("awq-pairs", f"{EXPERTS}.*.down_proj.weight", "up_proj.weight"),
        ("awq-pairs", f"{EXPERTS}.*.up_proj.weight", "up_proj.weight"),
        ("awq-pairs", f"{LAYER}.self_attn.o_proj.weight", "v_proj.weight"),
        ("smoothquant", f"{LAYER}.self_attn.q_proj.weight", INPUT_NORM),
        ("smoothquant-experts", f"{EXPERTS}.*", NORM),
        ("smoothquant-experts", f"{LAYER}.mlp.gate.weight", NORM),
    ],
)
def test_scales_that_a_tool_moved_are_noticed(name: str, mapped: str, moved: str) -> None:
    """Both ways round: its weights behind the original's, and the original's behind its."""
    for base, other in (("base", name), (name, "base")):
        with raises(PlanError, moved):
            smoothed_logits(base, other, mapped)


@pytest.mark.parametrize(
    ("name", "mapped", "error"),
    [
        ("awq", (f"{LAYER}.mlp.*", NORM), 0.3),
        ("awq", (f"{LAYER}.self_attn.*", INPUT_NORM), 0.3),
        ("awq-pairs", (f"{EXPERTS}.*",), 0.3),
        ("awq-pairs", (f"{EXPERTS}.1.*",), 0.3),
        ("smoothquant", (f"{EXPERTS}.*",), 0.05),
        ("smoothquant", (f"{LAYER}.self_attn.*", INPUT_NORM), 0.05),
        ("smoothquant-experts", (f"{LAYER}.mlp.*", NORM), 0.05),
    ],
)
def test_what_a_tool_moved_together_is_taken_together(name: str, mapped: tuple[str, ...], error: float) -> None:
    """No more than the tool's own rounding away from the original."""
    expected = load_file(SMOOTHED / "expected.safetensors")["base"]
    assert 0 < distance(smoothed_logits("base", name, *mapped), expected) < error


def fold_pairs(spread: float, experts: Iterable[int]) -> Callable[[dict[str, Tensor]], None]:
    """AWQ over up and down of some experts of layer 1 and, where it found less to move, by less."""

    def fold(tensors: dict[str, Tensor]) -> None:
        for expert in experts:
            name = f"model.layers.1.mlp.experts.{expert}"
            scale = factors(tensors[f"{name}.up_proj.weight"].shape[0]) ** spread
            tensors[f"{name}.up_proj.weight"] /= scale[:, None]
            tensors[f"{name}.down_proj.weight"] *= scale

    return fold


def round_to(bits: int) -> Callable[[dict[str, Tensor]], None]:
    def fold(tensors: dict[str, Tensor]) -> None:
        for tensor in (tensor for tensor in tensors.values() if tensor.dim() == 2):
            groups = tensor.view(-1, 16)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            step = (high - low) / ((1 << bits) - 1)
            groups.copy_(((groups - low) / step).round() * step + low)

    return fold


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("spread", [0.05, 0.1, 0.2])
def test_factors_near_one_are_noticed(base: Path, tmp_path: Path, spread: float, bits: int) -> None:
    """Rows' lengths alone tell less than coarse rounding does; the columns behind them tell the rest."""

    def fold(tensors: dict[str, Tensor]) -> None:
        fold_pairs(spread, range(8))(tensors)
        round_to(bits)(tensors)

    other = changed(base, tmp_path / "other", fold)
    with raises(PlanError, "base", "other"):
        logits(base, other, {"model.layers.1.mlp.experts.*.down_proj.weight": "other"})


def test_more_than_one_pair_is_looked_at(base: Path, tmp_path: Path) -> None:
    """A tool may leave the first experts as they were."""
    other = changed(base, tmp_path / "other", fold_pairs(1.0, range(4, 8)))
    with raises(PlanError):
        logits(base, other, {f"{EXPERTS.replace('.0', '.*')}.*.down_proj.weight": "other"})


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("mapped", ["*.experts.*.down_proj.weight", "*.experts.*.up_proj.weight", "*.v_proj.weight"])
def test_coarse_rounding_is_no_disagreement(base: Path, tmp_path: Path, mapped: str, bits: int) -> None:
    found = logits(base, changed(base, tmp_path / "other", round_to(bits)), {mapped: "other"})
    assert 0 < distance(found, logits(base)) < 2.0 / 2**bits  # a bit more halves the steps
