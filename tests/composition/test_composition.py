"""A model composed of several precisions equals one hand-built from the dequantized tensors, bit for bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.model import MixedPrecisionSettings
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.models.families.qwen3_moe import FAMILY
from tests.models.harness import Runner, hand_built, like, load_model
from tests.models.tiny import save_tiny

SOURCES = ("bf16", "fp8", "int8", "int4")
PROMPT = list(range(3, 60))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("composition")
    save_tiny(FAMILY, root / "bf16", dtype=torch.bfloat16)
    for name, options in (
        ("fp8", QuantizeOptions(scale="block")),
        ("int8", QuantizeOptions()),
        ("int4", QuantizeOptions(group_size=16)),
    ):
        quantize_checkpoint(str(root / "bf16"), root / name, name, options)
    return {name: root / name for name in SOURCES}


def mixture(folders: dict[str, Path], mapping: dict[str, str]) -> MixedPrecisionSettings:
    return MixedPrecisionSettings(
        sources={name: str(folders[name]) for name in SOURCES[1:]},
        weight_mapping={pattern: source for pattern, source in mapping.items() if source != "bf16"},
    )


def among_experts() -> dict[str, str]:
    """Every expert of a layer from the next source."""
    return {f"model.layers.*.mlp.experts.{expert}.*": SOURCES[expert % 4] for expert in range(8)}


def among_projections() -> dict[str, str]:
    """Every projection of every expert from the next source."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": SOURCES[(layer + expert + index) % 4]
        for layer in range(2)
        for expert in range(8)
        for index, part in enumerate(("gate", "up", "down"))
    }


def everywhere() -> dict[str, str]:
    """Attention too."""
    attention = {
        f"model.layers.*.self_attn.{part}_proj.weight": SOURCES[i] for i, part in enumerate(("q", "k", "v", "o"))
    }
    return among_projections() | attention


@pytest.mark.parametrize(
    ("dtype", "is_compiled"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("mapping", [among_experts, among_projections, everywhere])
def test_equals_the_model_of_dequantized_tensors(
    folders: dict[str, Path], mapping: object, dtype: torch.dtype, is_compiled: bool
) -> None:
    """In the arithmetic that all formats share: float32 in the compiled kernels, and torch's in either type."""
    decoder, version = load_model(folders["bf16"], dtype=dtype, mixed=mixture(folders, mapping()))  # type: ignore[operator]
    formats = Counter(origin.format for origin in version.origins.values() if ".experts." in origin.slot)
    assert set(formats) == set(SOURCES)

    if not is_compiled:
        decoder = like(decoder, ReferenceBackend)
    composed, expected = (
        Runner(decoder, v).step({0: PROMPT, 3: PROMPT[5:9]}) for v in (version, hand_built(version, dtype))
    )
    assert torch.equal(composed[0], expected[0])
    assert torch.equal(composed[3], expected[3])


def test_mixed_is_between_its_parts(folders: dict[str, Path]) -> None:
    """A composed model is neither of its sources: each source's weights really are in use."""
    _, wide = load_model(folders["bf16"])
    decoder, mixed = load_model(folders["bf16"], mixed=mixture(folders, among_projections()))
    reference = Runner(decoder, wide).step({0: PROMPT})[0]
    distances = []
    for source in (None, *SOURCES[1:]):
        mapping = among_projections() if source is None else {"model.layers.*.mlp.experts.*": source}
        _, version = load_model(folders["bf16"], mixed=mixture(folders, mapping))
        distances.append(float((Runner(decoder, version).step({0: PROMPT})[0] - reference).norm()))
    assert distances[2] < distances[0] < distances[3]  # int8 < mixed < int4
    assert all(distance > 0 for distance in distances)
    assert mixed.fingerprint != wide.fingerprint
