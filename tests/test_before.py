"""Files of an earlier commit are read as they were then: `tests/data/before/README.md` says what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from amalgam.checkpoint import shards, store
from amalgam.checkpoint.packed_file import PackedFile
from amalgam.checkpoint.shards import Identity
from amalgam.composition import packed_cache, planned
from amalgam.composition.loader import ModelLoader
from amalgam.composition.source import Source
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.reading import load_settings
from amalgam.config.statistics import StatisticsSettings
from amalgam.experts.overview import drift
from amalgam.experts.saved.files import load
from amalgam.experts.saved.sets import merge
from amalgam.experts.tracker import ExpertTracker
from amalgam.formats.contract import StoredWeight
from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.weights import PackedWeight
from amalgam.models.weights import WeightVersion
from tests.conftest import ROOT

BEFORE = ROOT / "tests/data/before"
CPU = torch.device("cpu")
MAPPING = {f"model.layers.*.mlp.experts.{expert}.*": source for expert, source in enumerate(("fp8", "int8", "int4"))}
DEMO_LAYERS, DEMO_EXPERTS, DEMO_TOP_K = range(6), 16, 4


def demo_tracker(**settings: str) -> ExpertTracker:
    statistics = StatisticsSettings.model_validate({"pair_sampling": 1, **settings})
    return ExpertTracker(DEMO_LAYERS, DEMO_EXPERTS, DEMO_TOP_K, statistics)


@pytest.mark.parametrize("name", ["saved.npz", "continued.npz"])
def test_saved_sets(name: str) -> None:
    expected = json.loads((BEFORE / "statistics.json").read_text())
    saved = load(BEFORE / name)
    assert int(saved.total.counts.sum()) == expected["total_activations"]
    assert saved.total.num_tokens.tolist() == [expected["prompt_tokens"], expected["generated_tokens"]]
    assert int(saved.total.num_requests) == expected["total_requests"]
    assert list(saved.labels) == ["prose", "code"] and saved.model == "demo"
    num_tokens = int(saved.total.num_tokens.sum())
    assert saved.pairs is not None and saved.pairs.num_tokens == num_tokens
    np.testing.assert_array_equal(saved.pairs.together.sum(axis=(1, 2)), num_tokens * DEMO_TOP_K**2)
    assert merge([saved, saved]).total.counts.sum() == 2 * expected["total_activations"]
    found = drift(demo_tracker(reference=str(BEFORE / name)))
    assert found["reference_tokens"] == num_tokens


def test_statistics_go_on_from_their_file(tmp_path: Path) -> None:
    path = Path(shutil.copy(BEFORE / "continued.npz", tmp_path))
    expected = load(path)
    assert len(expected.buckets) == 3 and expected.tick_seconds == 0.2
    for _ in range(2):  # read as it was, then as it is written now
        tracker = demo_tracker()
        tracker.autosave_to(path)
        tracker.close()
        np.testing.assert_array_equal(tracker.saved_set().total.counts, expected.total.counts)
        assert tracker.snapshot().labels == {name: tally.num_tokens.sum() for name, tally in expected.labels.items()}
    assert {item.name for item in tmp_path.iterdir()} == {"continued.npz"}


class AsItLay:
    """Part of a key, where the checkpoints lay when the cache was made."""

    def __init__(self, part: object) -> None:
        self.part = part

    def __repr__(self) -> str:
        return repr(self.part).replace(str(BEFORE / "model"), "/srv/amalgam-before")


def build(cache: str) -> WeightVersion:
    mixed = MixedPrecisionSettings(
        sources={name: str(BEFORE / "model" / name) for name in MAPPING.values()}, weight_mapping=MAPPING
    )
    model = ModelSettings(base_path=str(BEFORE / "model/base"), mixed_precision=mixed)
    opened = ModelLoader(model, InferenceSettings(packed_cache=cache), CPU, 1)
    return opened.build(opened.plan(), 1).version


@pytest.mark.skipif(
    not extension.is_available() or extension.isa() == "portable",
    reason="the kernels that read coded bf16 are not built",
)
def test_the_packed_cache_is_mapped_or_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the checkpoint's files where they were then, unchanged. Panels have become other bytes since."""
    cache = Path(shutil.copytree(BEFORE / "model/cache", tmp_path / "cache"))
    indices = [PackedFile(path).index for path in cache.iterdir()]
    identities = {Path(source[0]).parts[-2:]: tuple(source) for index in indices for source in index["sources"]}
    expected = build("")

    def identify(file: Path, status: object = None) -> Identity:
        return identities[file.parts[-2:]]  # type: ignore[return-value]

    read: list[str] = []
    load_weight = Source.load

    def counted(self: Source, stored: StoredWeight, *rest: Any) -> PackedWeight:
        read.append(stored.name)
        return load_weight(self, stored, *rest)

    for module in (shards, store, packed_cache):
        monkeypatch.setattr(module, "identify", identify)
    monkeypatch.setattr(planned, "key_of", lambda *parts: packed_cache.key_of(*map(AsItLay, parts)))
    monkeypatch.setattr(packed_cache, "__version__", indices[0]["made_by"]["amalgam"])
    monkeypatch.setattr(Source, "load", counted)
    assert indices[0]["made_by"]["panels"] < panels.layout_version()
    made_anew = build(str(cache))
    assert len(read) == len(made_anew.origins) == sum(len(index["weights"]) for index in indices)
    read.clear()
    found = build(str(cache))
    assert read == []
    assert all(found[slot].is_mapped for slot in found.origins)
    monkeypatch.undo()
    for slot in found.origins:
        torch.testing.assert_close(found[slot].dequantize(), expected[slot].dequantize(), rtol=0, atol=0)


def test_the_demo_s_configuration() -> None:
    settings = load_settings(BEFORE / "demo.yaml", {}, {})
    mixed = settings.model.mixed_precision
    assert set(mixed.derived) == {"fp8", "int4"} and len(mixed.weight_mapping) == 8
    assert settings.inference.max_seq_length == 4096 and settings.statistics.enabled


def test_every_setting_is_still_one_and_means_the_same() -> None:
    expected = yaml.safe_load((BEFORE / "every_setting.yaml").read_text())
    found = load_settings(BEFORE / "every_setting.yaml", {}, {}).model_dump(mode="json")
    for section, values in expected.items():
        for name, value in values.items():
            if (section, name) not in {("server", "export_dir"), ("model", "mixed_precision")}:  # a path; below
                assert found[section][name] == value, (section, name)
    mixed = expected["model"]["mixed_precision"]
    assert mixed.items() <= found["model"]["mixed_precision"].items()
