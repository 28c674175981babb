"""Sources that are declared and not used yet: opened and compared ahead, so that a change finds that done."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.checkpoint.safetensors_header import TensorEntry
from amalgam.checkpoint.store import TensorStore
from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.placement import build_rules
from amalgam.config.settings import build_settings
from amalgam.errors import CheckpointError
from amalgam.runtime import lookahead
from amalgam.runtime.lookahead import LookAhead
from amalgam.runtime.opening import open_deployment
from tests.errors import raises
from tests.planning.conftest import small

__all__ = ["small"]

EXPERT = "model.layers.0.mlp.experts.3"


def loader_of(base: Path, **sources: Path | str) -> ModelLoader:
    mixed = MixedPrecisionSettings(sources={name: str(path) for name, path in sources.items()})
    model = ModelSettings(base_path=str(base), mixed_precision=mixed)
    return ModelLoader(model, InferenceSettings(), torch.device("cpu"), 1)


def look(loader: ModelLoader) -> None:
    ahead = LookAhead(loader, loader.sources)
    ahead.start()
    ahead.wait()


def test_a_change_of_experts_reads_nothing_that_was_looked_at(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(small / "base", int8=small / "int8")
    look(loader)
    read: list[str] = []
    original = TensorStore.read

    def counted(self: TensorStore, entry: TensorEntry, *rest: object, **more: object) -> torch.Tensor:
        read.append(entry.name)
        return original(self, entry, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorStore, "read", counted)
    loader.plan(build_rules({f"{EXPERT}.{name}_proj.weight": "int8" for name in ("gate", "up", "down")}))
    assert read == []
    loader_of(small / "base", int8=small / "int8").plan(build_rules({f"{EXPERT}.up_proj.weight": "int8"}))
    assert all(EXPERT in name for name in read)  # an expert of two sources is looked at for itself


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_server_looks_at_what_it_does_not_use_where_that_is_wanted(
    small: Path, monkeypatch: pytest.MonkeyPatch, is_wanted: bool
) -> None:
    looked_at: list[list[str]] = []

    class Noted(LookAhead):
        def __init__(self, loader: ModelLoader, sources: Iterable[str]) -> None:
            looked_at.append(list(sources))
            super().__init__(loader, ())

    monkeypatch.setattr(lookahead, "LookAhead", Noted)
    sources = {name: str(small / name) for name in ("int3", "int4", "int8")}
    mixed = {"sources": sources, "weight_mapping": {f"{EXPERT}.*": "int4"}}
    settings = {
        "model": {"base_path": str(small / "base"), "mixed_precision": mixed},
        "inference": {"max_seq_length": 64, "max_batch_size": 1},
        "weights": {"look_ahead": is_wanted},
    }
    deployment = open_deployment(build_settings(settings))
    try:
        lookahead.look_ahead(deployment)
    finally:
        deployment.close()
    assert looked_at == ([["int3", "int8"]] if is_wanted else [])


def test_what_is_wrong_with_a_source_is_logged_and_the_others_are_looked_at(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(small / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(drawn, other / "model.safetensors")
    (other / "config.json").write_bytes((small / "base" / "config.json").read_bytes())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"nothing")
    loader = loader_of(
        small / "base", broken=broken, other=other, int8=small / "int8", elsewhere="somebody/never-downloaded"
    )
    with caplog.at_level(logging.DEBUG, "amalgam.models"):
        look(loader)
    levels = {record.args[0]: record.levelname for record in caplog.records if isinstance(record.args, tuple)}
    assert levels == {"base": "DEBUG", "broken": "WARNING", "other": "INFO", "int8": "DEBUG"}
    with raises(CheckpointError, "broken"):
        loader.plan(build_rules({f"{EXPERT}.up_proj.weight": "broken"}))
