"""Re-maps that fail: what is served stays as it is, nothing is kept, and mending the files is enough to try again."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from amalgam.checkpoint.shards import MappedShard, PickleShard
from amalgam.checkpoint.store import TensorStore
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.loader import LoadedVersion, ModelLoader
from amalgam.composition.source import Source
from amalgam.config.settings import build_settings
from amalgam.engine.params import SamplingParams
from amalgam.errors import AmalgamError, CheckpointError, LostWeightsError, OutOfMemoryError, PlanError
from amalgam.formats.contract import StoredWeight
from amalgam.kernels.backends.cpu import extension
from amalgam.models.registry import read_spec
from amalgam.models.spec import Slot
from amalgam.models.weights import WeightVersion
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from tests.conftest import DEMO
from tests.errors import raises
from tests.server.conftest import wait_until

EXPERTS = "model.layers.*.mlp.experts.*"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 256,  # so that weights are large enough to be read through mapped pages
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
PROMPT = [40, 50, 60, 70, 80]
NUM_WEIGHTS = 2 * 4 * 3

needs_watching = pytest.mark.skipif(
    importlib.util.find_spec("amalgam._mapping") is None, reason="the extension that watches is not built"
)


def write_model(folder: Path, noise: float = 0.0) -> None:
    """A tiny mixture of random weights with the demo's tokenizer.

    Args:
        noise: as much of the expert weights is changed, as rounding changes them.
    """
    family, spec = read_spec(CONFIG, "CONFIG")
    draw = torch.Generator().manual_seed(0)

    def values(slot: Slot) -> torch.Tensor:
        tensor, other = (torch.randn(slot.shape, generator=draw) * 0.1 for _ in range(2))
        return (tensor + noise * other if slot.role == "expert" else tensor).to(torch.bfloat16)

    write_checkpoint(folder, ((family.logical_name(slot), values(slot)) for slot in spec.slots))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


@dataclass
class Stand:
    """A deployment of `base` that may take weights from `other`, which tests damage."""

    deployment: Deployment
    other: Path
    whole: Path  # what `other` is when nothing is wrong with it

    @property
    def file(self) -> Path:
        return self.other / "model.safetensors"

    def repair(self) -> None:
        shutil.rmtree(self.other, ignore_errors=True)
        shutil.copytree(self.whole, self.other)

    def answer(self) -> tuple[int, ...]:
        params = SamplingParams(max_new_tokens=8, do_sample=False, ignore_eos=True)
        [answer] = self.deployment.engine.generate([PROMPT], params)
        assert answer.error is None
        return answer.token_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    write_model(root / "base")
    write_model(root / "whole", noise=0.01)
    return root


@pytest.fixture(scope="module")
def opened(folders: Path) -> Iterator[Stand]:
    other = folders / "other"
    shutil.copytree(folders / "whole", other)
    deployment = open_deployment(
        build_settings(
            {
                "model": {"base_path": str(folders / "base"), "mixed_precision": {"other_path": str(other)}},
                "inference": {"max_seq_length": 64},
                # A build reads in the order of its weights, and none are kept to go back to.
                "engine": {"load_threads": 1, "rollback_answers": 0},
            }
        )
    )
    yield Stand(deployment, other, folders / "whole")
    deployment.close()


def kept_open(folder: Path) -> list[str]:
    """Files below a folder that this process has open or mapped."""
    if sys.platform != "linux":
        return []
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if link.is_symlink()]
    names += Path("/proc/self/maps").read_text().splitlines()
    return [name for name in names if f"{folder}/" in name]


def versions_of(deployment: Deployment) -> list[WeightVersion]:
    """Those in memory; what is freed is freed in a thread."""
    gc.collect()
    return deployment.live_versions


@pytest.fixture
def stand(opened: Stand) -> Iterator[Stand]:
    """Whatever a test does to the files: afterwards all is as before, and with whole files the re-map succeeds."""
    deployment = opened.deployment
    opened.repair()
    before, rules, expected = deployment.version, deployment.rules, opened.answer()
    yield opened
    assert deployment.version is before
    assert (deployment.version.fingerprint, deployment.rules) == (before.fingerprint, rules)
    assert deployment.remaps[-1].error is not None
    assert opened.answer() == expected
    wait_until(lambda: versions_of(deployment) == [before])
    assert not kept_open(opened.other)
    opened.repair()
    deployment.update_weight_mapping({EXPERTS: "other"})
    assert deployment.version.fingerprint != before.fingerprint
    deployment.update_weight_mapping({EXPERTS: "base"})
    assert deployment.version.fingerprint == before.fingerprint
    assert opened.answer() == expected


Change = Callable[[Path], object]


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewritten(file: Path) -> None:
        store = TensorStore.open(file.parent)
        tensors = {name: store.read(name).clone() for name in store}
        store.close()
        change(tensors)
        file.unlink()
        write_checkpoint(file.parent, tensors.items())

    return rewritten


def overwrite(file: Path) -> None:
    """In place, as `cp` does it: the same inode and size, other values."""
    data = bytearray(file.read_bytes())
    data[-1000:] = bytes(1000)
    with file.open("r+b") as stream:
        stream.write(data)


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 8)  # what is mapped behind that is gone


def exchange(file: Path) -> None:
    shutil.copy(file, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


AT_FIRST: dict[str, tuple[Change, type[AmalgamError]]] = {
    "a tensor is missing": (rewrite(lambda tensors: tensors.pop(UP)), PlanError),
    "a shape is another": (rewrite(lambda tensors: tensors.update({UP: tensors[UP][:-1]})), PlanError),
    "the file is gone": (Path.unlink, CheckpointError),
    "the file is short": (shorten, CheckpointError),
    "the header is damaged": (lambda file: file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:]), CheckpointError),
}
MIDWAY: dict[str, Change] = {
    "is overwritten": overwrite,
    "shrinks": shorten,
    "becomes empty": lambda file: os.truncate(file, 0),
    "vanishes": Path.unlink,
    "is exchanged": exchange,
}


# Each at the first weight or at the last, and what takes pages away at both.
WHEN = [
    ("is overwritten", NUM_WEIGHTS),
    ("shrinks", 1),
    ("shrinks", NUM_WEIGHTS),
    ("becomes empty", 1),
    ("becomes empty", NUM_WEIGHTS),
    ("vanishes", NUM_WEIGHTS),
    ("is exchanged", 1),
]
assert {fault for fault, _ in WHEN} == MIDWAY.keys()


@pytest.mark.parametrize("fault", AT_FIRST)
def test_a_source_that_does_not_fit(stand: Stand, fault: str) -> None:
    change, error = AT_FIRST[fault]
    change(stand.file)
    with raises(error, stand.other):
        stand.deployment.update_weight_mapping({EXPERTS: "other"})


@pytest.mark.parametrize("rules", [{"model.layers.7.*": "other"}, {EXPERTS: "nowhere"}])
def test_rules_that_cannot_be_followed(stand: Stand, rules: dict[str, str]) -> None:
    with pytest.raises(PlanError):
        stand.deployment.update_weight_mapping(rules)


def after_reads(monkeypatch: pytest.MonkeyPatch, count: int, change: Callable[[], object]) -> None:
    """Let something happen when the build has been given so many tensors, the last of them not looked at yet."""
    is_building, num_reads = False, 0

    def read(self: MappedShard, entry: Any) -> torch.Tensor:
        nonlocal num_reads
        tensor = read_original(self, entry)
        num_reads += is_building
        if num_reads == count:
            change()
        return tensor

    def build(*arguments: Any) -> LoadedVersion:
        nonlocal is_building
        is_building = True
        return build_original(*arguments)

    read_original, build_original = MappedShard.read, ModelLoader.build
    monkeypatch.setattr(MappedShard, "read", read)
    monkeypatch.setattr(ModelLoader, "build", build)


@needs_watching
@pytest.mark.parametrize(("fault", "count"), WHEN)
def test_a_file_that_changes_midway(stand: Stand, monkeypatch: pytest.MonkeyPatch, fault: str, count: int) -> None:
    """Also while its mapped pages are read: they are not there any more, and no signal ends the process."""
    with monkeypatch.context() as patch:
        after_reads(patch, count, lambda: MIDWAY[fault](stand.file))
        with raises(CheckpointError, stand.file):
            stand.deployment.update_weight_mapping({EXPERTS: "other"})


def test_no_memory(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Source.load

    def fail(self: Source, stored: StoredWeight, *arguments: Any) -> Any:
        if stored.name != UP:
            return load(self, stored, *arguments)
        return torch.empty(2**50, dtype=torch.uint8)  # more than any machine maps

    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", fail)
        with raises(OutOfMemoryError, UP):
            stand.deployment.update_weight_mapping({EXPERTS: "other"})


def test_the_memory_of_a_version_that_cannot_run_goes_back(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[ref[WeightVersion]] = []
    alive: list[bool] = []

    def fail(version: WeightVersion) -> None:
        built.append(ref(version))
        raise RuntimeError("it cannot be compiled")

    with monkeypatch.context() as patch:
        patch.setattr(stand.deployment.engine, "prepare", fail)
        patch.setattr(
            stand.deployment.versions, "has_freed", lambda: alive.append(any(each() is not None for each in built))
        )
        with pytest.raises(RuntimeError):
            stand.deployment.update_weight_mapping({EXPERTS: "other"})
    assert len(built) == 1 and alive == [False]


@needs_watching
def test_a_pickled_checkpoint_that_shrinks(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2**18), "b": torch.ones(2**18)}, file)
    shard = PickleShard(file)
    views = [shard.read(entry) for entry in shard.entries]
    assert all(bool(view.all()) for view in views)
    os.truncate(file, 2**12)
    assert not any(view[2**17 :].any() for view in views)
    with raises(CheckpointError, file):
        shard.check()


@needs_watching
@pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")
def test_a_packed_cache_that_shrinks_ends_the_engine_with_an_error(folders: Path, tmp_path: Path) -> None:
    settings = build_settings(
        {
            "model": {"base_path": str(folders / "base")},
            "inference": {"max_seq_length": 64, "packed_cache": str(tmp_path)},
        }
    )
    deployment = open_deployment(settings)
    params = SamplingParams(max_new_tokens=4, do_sample=False, ignore_eos=True)
    [expected] = deployment.engine.generate([PROMPT], params)
    [file] = tmp_path.glob("*.packed")
    os.truncate(file, 4096)
    [answer] = deployment.engine.generate([PROMPT[::-1]], params)
    assert isinstance(answer.error, LostWeightsError) and not answer.token_ids
    assert not deployment.engine.status().is_alive
    deployment.close()
    again = open_deployment(settings)
    assert again.engine.generate([PROMPT], params)[0].token_ids == expected.token_ids
    again.close()


def test_changes_while_a_version_drains(opened: Stand) -> None:
    """A request keeps its version through several changes; versions that nobody runs on are gone at once."""
    opened.repair()
    deployment = opened.deployment
    params = SamplingParams(max_new_tokens=40, do_sample=False, ignore_eos=True)
    [alone] = deployment.engine.generate([PROMPT], params)
    first = deployment.version_id

    def change(index: int, output: Any) -> None:
        if len(versions) < 2 and output.token_ids:
            versions.append(deployment.update_weight_mapping({EXPERTS: ("other", "base")[len(versions)]}).version)

    versions: list[int] = []
    [answer] = deployment.engine.generate([PROMPT], params, watch=change)
    assert (answer.token_ids, answer.usage.version, len(versions)) == (alone.token_ids, first, 2)
    wait_until(lambda: [version.version_id for version in versions_of(deployment)] == versions[1:])


def change_for_ever(settings: dict[str, Any], told: Connection) -> None:
    """A process that serves nobody."""
    deployment = open_deployment(build_settings(settings))
    told.send(deployment.version.fingerprint)
    while True:
        for source in ("other", "base"):
            deployment.update_weight_mapping({EXPERTS: source})


@pytest.mark.skipif(not extension.is_available(), reason="the native kernels are not built")
def test_a_process_that_is_killed_midway_leaves_nothing(
    opened: Stand, folders: Path, tmp_path: Path, context: ForkServerContext
) -> None:
    """The next start has the same weights, and what was half written into the packed cache is gone."""
    opened.repair()
    settings = {
        "model": {"base_path": str(folders / "base"), "mixed_precision": {"other_path": str(opened.other)}},
        "inference": {"max_seq_length": 64, "packed_cache": str(tmp_path)},
    }
    mine, others = context.Pipe()
    child = context.Process(target=change_for_ever, args=(settings, others))
    child.start()
    try:
        assert mine.poll(150)
        fingerprint = mine.recv()
    finally:
        child.kill()
        child.join()
    deployment = open_deployment(build_settings(settings))
    try:
        assert deployment.version.fingerprint == fingerprint
        assert Stand(deployment, opened.other, opened.whole).answer() == opened.answer()
        assert not list(tmp_path.glob(".*"))
    finally:
        deployment.close()
