"""A second start maps the same weights that the first one packed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.settings import build_settings
from amalgam.kernels.backends.cpu import extension, mapped, panels, products
from amalgam.kernels.layouts import DENSE, PANELS_BF16, PANELS_BF16_CODED
from amalgam.tools.estimate import estimate
from tests.composition.packed_cache.building import CPU, MAPPING, SOURCES, assert_same, build, loader
from tests.conftest import DEMO

pytestmark = pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")


def test_the_second_start_reads_no_source_and_gives_the_same_bits(
    originals: Path, cache: Path, loads: list[str]
) -> None:
    expected = build(originals, None)
    assert expected.mapped_bytes == 0
    loads.clear()
    first = build(originals, cache)
    assert sorted(loads) == sorted(origin.name for origin in first.origins.values())
    loads.clear()
    second = build(originals, cache)
    assert loads == []
    for version in (first, second):
        assert_same(version, expected)
        assert version.mapped_bytes == version.nbytes
    assert len(list(cache.iterdir())) == 4  # one file per source, and nothing temporary


def test_panels_serve_every_activation(originals: Path, cache: Path, loads: list[str]) -> None:
    build(originals, cache, activation="int8")
    loads.clear()
    found = build(originals, cache, activation="bf16")
    assert loads == []
    expected = build(originals, None, activation="bf16")
    assert_same(found, expected)
    name = "layers.0.mlp.experts.1.gate"  # int8
    x = torch.randn(2, found[name].shape[1]).to(torch.bfloat16)
    assert torch.equal(products.linear(x, found[name]), products.linear(x, expected[name]))


@pytest.mark.skipif(
    extension.is_available() and extension.isa() in ("amx_emulated", "portable"),
    reason="portable code does not gain from coding",
)
def test_coded_and_plain_bf16_are_kept_apart(originals: Path, cache: Path, loads: list[str]) -> None:
    coded = build(originals, cache, mapping={})
    loads.clear()
    plain = build(originals, cache, mapping={}, bf16_coding=False)
    assert loads and not any(name.endswith(("mlp.gate.weight", "norm.weight")) for name in loads)
    assert_same(plain, build(originals, None, mapping={}, bf16_coding=False))
    layouts = [{version[slot].layout for slot in version.origins} for version in (coded, plain)]
    assert layouts[0] - layouts[1] == {PANELS_BF16_CODED}
    for slot in plain.origins:
        assert torch.equal(coded[slot].dequantize(), plain[slot].dequantize())
    loads.clear()
    assert_same(build(originals, cache, mapping={}), coded)
    assert loads == []


def test_what_a_weight_takes_is_known_before_it_is_loaded(originals: Path) -> None:
    opened = loader(originals, None)
    planned = opened.plan()
    version = opened.build(planned, 1).version
    for weight in planned:
        found = version[weight.slot.name]
        padding = 16 * 2 * weight.slot.shape[-1] if isinstance(found, panels.PanelWeight) else 0
        if found.layout is PANELS_BF16_CODED:
            assert 0.9 * weight.memory_bytes < found.nbytes <= weight.memory_bytes
        elif found.layout in (PANELS_BF16, DENSE):
            assert weight.nbytes <= found.nbytes <= weight.memory_bytes + padding


def test_weights_quantized_while_loading_are_kept_apart(originals: Path, cache: Path, loads: list[str]) -> None:
    plain = build(originals, cache, mapping={})
    loads.clear()
    narrow = build(originals, cache, mapping={}, load_in_4bit=True)
    assert loads and all("proj" in name for name in loads)
    assert_same(narrow, build(originals, None, mapping={}, load_in_4bit=True))
    loads.clear()
    assert_same(build(originals, cache, mapping={}), plain)
    assert_same(build(originals, cache, mapping={}, load_in_4bit=True), narrow)
    assert loads == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_changed_source_is_packed_again(folders: Path, cache: Path, loads: list[str], file: str) -> None:
    before = build(folders, cache)
    old = set(cache.iterdir())
    path = folders / "int4" / file
    if file == "config.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "comment": "changed"}))
    else:
        os.utime(path, ns=(1, 1))
    loads.clear()
    after = build(folders, cache)
    assert loads and {after.origins[slot].source for slot in after.origins if after.origins[slot].name in loads} == {
        "int4"
    }
    assert {slot: before[slot].layout for slot in before.origins} == {
        slot: after[slot].layout for slot in after.origins
    }
    if file != "config.json":
        assert len(old - set(cache.iterdir())) == 1, "the file of what has changed is removed"
    loads.clear()
    build(folders, cache)
    assert loads == []


def test_a_remap_fills_the_cache_and_uses_it(originals: Path, cache: Path, loads: list[str]) -> None:
    opened = loader(originals, cache, {})
    first = opened.build(opened.plan(), 1).version
    other = loader(originals, cache)
    remapped = opened.build(other.plan(), 2, first)
    assert remapped.num_loaded and remapped.version.mapped_bytes == remapped.version.nbytes
    loads.clear()
    assert_same(build(originals, cache), remapped.version)
    again = opened.build(other.plan(), 3, first)
    assert loads == [] and again.num_loaded == remapped.num_loaded
    assert_same(again.version, remapped.version)


def test_of_writers_at_the_same_time_one_writes_and_the_others_wait(
    originals: Path, cache: Path, loads: list[str]
) -> None:
    expected = build(originals, None)
    loads.clear()
    found: list[LoadedVersion] = []

    def start() -> None:
        opened = loader(originals, cache)
        found.append(opened.build(opened.plan(), 1))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for loaded in found:
        assert_same(loaded.version, expected)
    assert len(loads) == len(expected.origins), "each weight is packed once"
    assert len(list(cache.iterdir())) == 4


def test_two_sources_may_be_one_folder(originals: Path, cache: Path) -> None:
    sources = {name: str(originals / "int8") for name in SOURCES}
    mixed = MixedPrecisionSettings(sources=sources, weight_mapping=MAPPING)
    model = ModelSettings(base_path=str(originals / "bf16"), mixed_precision=mixed)
    for folder in ("", str(cache)):
        opened = ModelLoader(model, InferenceSettings(packed_cache=folder), CPU, 2)
        version = opened.build(opened.plan(), 1).version
    assert version.mapped_bytes == version.nbytes


def test_other_layouts_come_from_the_source(
    originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    """What no table can expand again is loaded as ever, and everything else from the cache."""
    monkeypatch.setattr(mapped, "can_be_mapped", lambda weight: isinstance(weight, panels.PanelWeight))
    expected = build(originals, None)
    assert_same(build(originals, cache), expected)
    loads.clear()
    assert_same(build(originals, cache), expected)
    assert len(loads) == sum(not isinstance(expected[slot], panels.PanelWeight) for slot in expected.origins) > 0


def test_a_cache_without_native_kernels_is_refused_with_a_warning(
    originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "is_available", lambda: False)
    monkeypatch.setattr(extension, "why_unavailable", lambda: "They are not built.")
    with caplog.at_level(logging.WARNING):
        version = build(originals, cache)
    assert "packed_cache is not used: They are not built." in caplog.text
    assert version.mapped_bytes == 0 and not cache.exists()


def test_mapped_weights_count_as_no_memory_in_the_estimate(folders: Path, cache: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", folders / "bf16")
    settings = build_settings({"model": {"base_path": str(folders / "bf16")}})
    cached = settings.replace(inference={"packed_cache": str(cache)})
    plain, mapping = estimate(settings, 64, 1), estimate(cached, 64, 1)
    assert plain.mapped_bytes == 0
    assert mapping.mapped_bytes == mapping.weights_bytes == plain.weights_bytes
    others = plain.total_bytes - plain.weights_bytes - plain.process_bytes
    assert mapping.total_bytes - mapping.process_bytes == others
    for row, other in zip(plain.uniform, mapping.uniform, strict=True):
        assert row.weights_bytes == other.weights_bytes
        assert other.total_bytes - mapping.process_bytes == others
