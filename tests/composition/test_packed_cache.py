"""A second start maps the same weights that the first one packed, and never believes a file that does not fit."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam.base.locks import FileLock
from amalgam.checkpoint import packed_file
from amalgam.checkpoint.packed_file import ALIGNMENT, PackedFile, new_packed_file
from amalgam.composition import packed_cache
from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.source import Source
from amalgam.config.settings import InferenceSettings, MixedPrecisionSettings, ModelSettings, build_settings
from amalgam.errors import CheckpointError
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends.cpu import extension, mapped, panels, products
from amalgam.kernels.layouts import DENSE, PANELS_BF16, PANELS_BF16_CODED, dense
from amalgam.kernels.packed import PackedWeight
from amalgam.models.families.qwen3_moe import FAMILY
from amalgam.models.weights import WeightVersion
from amalgam.tools.estimate import estimate
from tests.conftest import DEMO
from tests.errors import raises
from tests.kernels import weights as made
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")

CPU = torch.device("cpu")
SOURCES = ("fp8", "int8", "int4")
MAPPING = {f"model.layers.*.mlp.experts.{expert}.*": SOURCES[expert % 3] for expert in range(6)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny model in bf16, fp8, int8 and int4."""
    root = tmp_path_factory.mktemp("originals")
    save_tiny(FAMILY, root / "bf16", dtype=torch.bfloat16)
    for name, options in (
        ("fp8", QuantizeOptions(scale="block")),
        ("int8", QuantizeOptions()),
        ("int4", QuantizeOptions(group_size=16)),
    ):
        quantize_checkpoint(str(root / "bf16"), root / name, name, options)
    return root


@pytest.fixture
def folders(originals: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(originals, tmp_path / "checkpoints"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that have been read from a source."""
    names: list[str] = []
    load = Source.load

    def counted(self: Source, stored: Any, *arguments: Any) -> PackedWeight:
        names.append(stored.name)
        return load(self, stored, *arguments)

    monkeypatch.setattr(Source, "load", counted)
    return names


def loader(folders: Path, cache: Path | None, mapping: dict[str, str] | None = None, **inference: Any) -> ModelLoader:
    mixed = MixedPrecisionSettings(
        sources={name: str(folders / name) for name in SOURCES},
        weight_mapping=MAPPING if mapping is None else mapping,
    )
    settings = InferenceSettings(packed_cache="" if cache is None else str(cache), **inference)
    return ModelLoader(ModelSettings(base_path=str(folders / "bf16"), mixed_precision=mixed), settings, CPU, 2)


def build(folders: Path, cache: Path | None, **arguments: Any) -> WeightVersion:
    opened = loader(folders, cache, **arguments)
    return opened.build(opened.plan(), 1).version


def assert_same(found: WeightVersion, expected: WeightVersion) -> None:
    """The same layouts and the same bits."""
    assert found.keys == expected.keys
    for slot in expected.origins:
        one, other = found[slot], expected[slot]
        assert (one.layout, one.shape, one.block) == (other.layout, other.shape, other.block), slot
        assert one.parts.keys() == other.parts.keys()
        for name, part in other.parts.items():
            assert one.parts[name].dtype == part.dtype and one.parts[name].shape == part.shape
            assert torch.equal(one.parts[name].reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", sorted(made.every_layout((48, 384))))
@pytest.mark.parametrize("activation", ["int8", "bf16"])
def test_a_restored_weight_computes_the_same_bits(name: str, activation: panels.ActivationType) -> None:
    for shape in ((48, 384), (33, 200), (1, 200)):
        if name not in (layouts := made.every_layout(shape)):
            continue
        weight = panels.prepare(layouts[name], activation)
        assert mapped.can_be_mapped(weight)
        description = json.loads(json.dumps(mapped.describe(weight)))
        # Memory of their own, so that the first weight's can go.
        memory = [aligned(run) for run in mapped.runs(weight)]
        restored = mapped.restore(description, memory, activation)
        del memory
        assert restored.nbytes == weight.nbytes
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn((3, shape[1]), generator=torch.Generator().manual_seed(1)).to(dtype)
            assert torch.equal(products.linear(x, restored), products.linear(x, weight))
        assert torch.equal(restored.dequantize(), weight.dequantize())


def aligned(run: torch.Tensor) -> torch.Tensor:
    spare = torch.empty(run.numel() + ALIGNMENT, dtype=torch.uint8)
    start = -spare.data_ptr() % ALIGNMENT
    return spare[start : start + run.numel()].copy_(run)


def change(description: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(description))
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layout",), "panels_int8"),
        (("layout",), "panels_fp32"),
        (("layout",), "panels_int5"),
        (("layout",), "dense"),
        (("layout",), 7),
        (("shape",), [384]),
        (("shape", 0), 64),
        (("shape", 0), -48),
        (("shape", 0), 0),
        (("shape", 0), 2**31),
        (("shape", 0), 48.0),
        (("shape", 1), 2**60),
        (("block",), None),
        (("block", 1), 0),
        (("block", 1), -64),
        (("block", 1), 12),
        (("block", 1), 128),
        (("parts", "scale", 0), "uint8"),
        (("parts", "scale", 0), "float32"),
        (("parts", "scale", 0), "complex"),
        (("parts", "scale", 1, 1), 7),
        (("parts", "scale", 1, 1), 0),
        (("parts", "scale", 1, 2), 3),
        (("parts", "scale", 1, 2), 1),
        (("parts", "scale", 1), [6]),
        (("parts", "group"), ["int32", [384]]),
        (("parts",), []),
    ],
)
def test_impossible_descriptions_are_refused(path: tuple[Any, ...], value: Any) -> None:
    weight = panels.prepare(made.int4((48, 384), 64, has_zero=True))
    memory = [aligned(run) for run in mapped.runs(weight)]
    with raises(ValueError):
        mapped.restore(change(mapped.describe(weight), path, value), memory, "int8")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (64, 1),  # the first panel's exceptions begin
        (64 + 4, 2**31 - 1),  # the second's
        (64 + 4, -1),
        (64 + 12, 0),  # the last's end
        (128, 384),  # a column
        (128, -1),
        (132, 16),  # a lane
    ],
)
def test_exceptions_of_a_coded_weight_lie_within_it(offset: int, value: int) -> None:
    weight = panels.prepare(made.coded((48, 384)))
    [memory] = [aligned(run) for run in mapped.runs(weight)]
    description = mapped.describe(weight)
    assert mapped.restore(description, [memory], "int8").parts["exceptions"].numel() > 128
    tail = memory[weight.parts["weight"].numel() :]
    size = 2 if offset == 132 else 4
    tail[offset : offset + size] = torch.tensor([value]).view(torch.uint8)[:size]
    with raises(ValueError):
        mapped.restore(description, [memory], "int8")


def test_a_coded_weight_is_as_long_as_its_exceptions() -> None:
    weight = panels.prepare(made.coded((48, 384)))
    [memory] = mapped.runs(weight)
    for length in (0, 64, weight.parts["weight"].numel(), memory.numel() - 8, memory.numel() - 3):
        with raises(ValueError):
            mapped.restore(mapped.describe(weight), [aligned(memory[:length])], "int8")
    longer = torch.cat([memory, torch.zeros(8 * 48 * 384, dtype=torch.uint8)])
    with raises(ValueError):
        mapped.restore(mapped.describe(weight), [aligned(longer)], "int8")


def test_a_dense_weight_is_as_long_as_it_says() -> None:
    """Its address is all that a kernel gets."""
    description = mapped.describe(dense(torch.zeros(2048, dtype=torch.bfloat16)))
    changed = change(change(description, ("parts", "weight", 1), [1]), ("runs",), [2])
    with raises(ValueError, (2048,)):
        mapped.restore(changed, [aligned(torch.zeros(2, dtype=torch.uint8))], "int8")


@pytest.mark.parametrize(
    "codebooks",
    [
        ["float32", [2, 256, 8]],  # twice the bytes
        ["float16", [2, 255, 8]],
        ["float16", [4, 128, 8]],
        ["float16", [2, 128, 16]],
        ["float16", [2, 512, 4]],
        ["float16", [0, 256, 8]],
        ["float16", [2, 256, 1, 8]],
        ["int16", [2, 256, 8]],
    ],
)
def test_codebooks_are_those_of_the_bytes(codebooks: list[Any]) -> None:
    weight = panels.prepare(made.codebooks((48, 384), 2, 8, 8, torch.float16))
    memory = [aligned(run) for run in mapped.runs(weight)]
    with raises(ValueError):
        mapped.restore(change(mapped.describe(weight), ("parts", "codebooks"), codebooks), memory, "int8")


def test_codes_of_a_damaged_file_name_no_vector_outside() -> None:
    weight = panels.prepare(made.codebooks((48, 384), 1, 9, 16, torch.float16))
    memory = aligned(mapped.runs(weight)[0])
    memory[: weight.parts["weight"].numel()] = 255
    books = weight.parts["codebooks"].float()
    values = mapped.restore(mapped.describe(weight), [memory], "int8").dequantize()
    assert torch.equal(values[0], (books[0, -1] * weight.parts["scale"][0, 0, 0].float()).repeat(24))


def test_panels_must_be_aligned() -> None:
    weight = panels.prepare(made.int4((48, 384), 64))
    [run] = mapped.runs(weight)
    shifted = aligned(torch.cat([torch.zeros(1, dtype=torch.uint8), run]))[1:]
    with raises(ValueError, "64-byte"):
        mapped.restore(mapped.describe(weight), [shifted], "int8")


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
    extension.is_available() and extension.isa() == "portable", reason="portable code does not gain from coding"
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


def truncate(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:
    return data + b"\0"


def empty(data: bytes) -> bytes:
    return b""


def only_the_head(data: bytes) -> bytes:
    return data[:20]


def damage_the_index(data: bytes) -> bytes:
    return data[:-10] + b"x" + data[-9:]


def huge_index(data: bytes) -> bytes:
    return data[:16] + (2**63).to_bytes(8, "little") + data[24:]


def with_index(change_index: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Somebody who makes the digest fit too."""

    def rewrite(data: bytes) -> bytes:
        start = int.from_bytes(data[8:16], "little")
        index = json.loads(data[start:])
        change_index(index)
        raw = json.dumps(index).encode()
        digest = hashlib.sha256(raw).digest()
        return data[:16] + len(raw).to_bytes(8, "little") + digest + data[56:start] + raw

    return rewrite


def each_weight(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def apply(index: dict[str, Any]) -> None:
        for entry in index["weights"].values():
            entry.update(changes)

    return apply


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncate,
    "longer": lengthen,
    "empty": empty,
    "only the head": only_the_head,
    "damaged index": damage_the_index,
    "huge index": huge_index,
    "another version": with_index(lambda index: index["made_by"].update(panels=-1)),
    "another byte order": with_index(lambda index: index["made_by"].update(byteorder="middle")),
    "no version": with_index(lambda index: index.pop("made_by")),
    "no weights": with_index(lambda index: index.pop("weights")),
    "weights as a list": with_index(lambda index: index.update(weights=[1])),
    "sources as numbers": with_index(lambda index: index.update(sources=[[1, 2, 3, 4]])),
    "outside": with_index(each_weight(offset=2**40)),
    "negative": with_index(each_weight(offset=-64)),
    "unaligned": with_index(each_weight(offset=65)),
    "in the head": with_index(each_weight(offset=0)),
    "long runs": with_index(each_weight(runs=[2**62])),
    "no runs": with_index(each_weight(runs=None)),
    "other shapes": with_index(each_weight(shape=[16, 8])),
    "other keys": with_index(lambda index: index.update(weights={f"{k}x": v for k, v in index["weights"].items()})),
}


@pytest.fixture(scope="module")
def filled(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightVersion, Path]:
    """What the originals hold, and a cache of it."""
    cache = tmp_path_factory.mktemp("filled")
    build(originals, cache)
    return build(originals, None), cache


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_fit_are_ignored_and_written_again(
    originals: Path, filled: tuple[WeightVersion, Path], cache: Path, loads: list[str], damage: str
) -> None:
    expected, good = filled
    cache.mkdir()
    for path in good.iterdir():
        (cache / path.name).write_bytes(DAMAGES[damage](path.read_bytes()))
    assert_same(build(originals, cache), expected)
    assert len(loads) == len(expected.origins)
    loads.clear()
    assert_same(build(originals, cache), expected)
    assert loads == []


def test_what_others_keep_in_the_folder_stays(originals: Path, cache: Path) -> None:
    cache.mkdir()
    for name in ("notes.txt", "model.packed", ".packed-mine.tmp"):
        (cache / name).write_text("mine")
    build(originals, cache)
    assert {"notes.txt", "model.packed", ".packed-mine.tmp"} <= {path.name for path in cache.iterdir()}


def test_locks_of_processes_that_were_killed_go(cache: Path) -> None:
    cache.mkdir()
    killed, held = cache / f".{'0' * 16}.lock", FileLock(cache / ("f" * 16))
    killed.write_text("process 1 on somewhere\n")
    with held:
        assert held.try_acquire()
        packed_cache.PackedCache(cache)
        assert [path.name for path in cache.iterdir()] == [f".{'f' * 16}.lock"]


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


def test_a_folder_that_cannot_be_written_to(
    originals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, loads: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        version = build(originals, tmp_path / "file" / "cache")
    assert "cannot be written" in caplog.text and version.mapped_bytes == 0
    assert len(loads) == len(version.origins), "nothing is read twice"
    assert_same(version, build(originals, None))


def test_a_disk_that_gets_full(
    originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, left = os.pwrite, [20]

    def full(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(packed_file.os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        version = build(originals, cache)
    assert "No space left" in caplog.text
    assert_same(version, build(originals, None))
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_too_small(
    originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loads: list[str]
) -> None:
    usage = shutil.disk_usage(originals)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        version = build(originals, cache)
    assert "1000 are free" in caplog.text and len(loads) == len(version.origins)


def test_a_failed_load_leaves_nothing_behind(folders: Path, cache: Path) -> None:
    opened = loader(folders, cache)

    def change(*_: object) -> None:
        os.utime(folders / "int4" / "model.safetensors", ns=(1, 1))

    with raises(CheckpointError, folders / "int4" / "model.safetensors"):
        opened.build(opened.plan(), 1, progress=change)
    assert list(cache.iterdir()) == []


def test_files_of_writers_that_died_are_removed(cache: Path) -> None:
    with new_packed_file(cache):
        if (child := os.fork()) == 0:
            try:
                writing = new_packed_file(cache)
                writing.__enter__()
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        assert len(list(cache.iterdir())) == 2
        packed_cache.PackedCache(cache)
        assert len(list(cache.iterdir())) == 1, "the one that is being written stays"


def test_runs_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [torch.arange(size, dtype=torch.uint8) for size in (1, 64, 100)]
    with new_packed_file(tmp_path) as writer:
        offset = writer.append(written)
        writer.commit(tmp_path / "file", {"offset": offset})
    file = PackedFile(tmp_path / "file")
    found = file.runs(file.index["offset"], [1, 64, 100])
    assert all(torch.equal(one, other) for one, other in zip(found, written, strict=True))
    assert all(run.data_ptr() % ALIGNMENT == 0 for run in found)
    (tmp_path / "file").unlink()
    del file
    assert torch.equal(found[2], written[2]), "a run keeps the file mapped"


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
