"""A folder of weights as one mapping: which files count, what is refused, and that reading shares the file's pages."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.errors import raises

from amalgam.checkpoint import TensorStore
from amalgam.checkpoint.shards import SMALL_BYTES, PickleShard
from amalgam.errors import CheckpointError

A = torch.arange(6, dtype=torch.float32).view(2, 3)
B = torch.arange(4, dtype=torch.bfloat16)


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def two_shards(folder: Path) -> None:
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")


def indexed(folder: Path) -> None:
    two_shards(folder)
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})


def renamed_index(folder: Path) -> None:
    indexed(folder)
    (folder / "model.safetensors.index.json").rename(folder / "model.bf16.safetensors.index.json")


def index_beside_a_copy(folder: Path) -> None:
    indexed(folder)
    save_file({"a": A + 1, "b": B + 1}, folder / "consolidated.safetensors")


def single(folder: Path) -> None:
    save_file({"a": A, "b": B}, folder / "model.safetensors")


def single_beside_a_variant(folder: Path) -> None:
    single(folder)
    save_file({"a": A + 1, "b": B + 1}, folder / "model.fp16.safetensors")
    write_index(folder, {"a": "model.fp16.safetensors"}, "model.fp16.safetensors.index.json")


def single_beside_pickle(folder: Path) -> None:
    single(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even looked at")


def single_bin(folder: Path) -> None:
    torch.save({"a": A, "b": torch.nn.Parameter(B)}, folder / "pytorch_model.bin")
    torch.save({"learning_rate": 1}, folder / "training_args.bin")


def bin_shards(folder: Path) -> None:
    torch.save({"a": A}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": B}, folder / "pytorch_model-00002-of-00002.bin")


def indexed_bin(folder: Path) -> None:
    bin_shards(folder)
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(folder, weight_map, "pytorch_model.bin.index.json")


LAYOUTS = [
    indexed,
    renamed_index,
    index_beside_a_copy,
    two_shards,
    single,
    single_beside_a_variant,
    single_beside_pickle,
    single_bin,
    bin_shards,
    indexed_bin,
]


@pytest.mark.parametrize("build", LAYOUTS)
def test_every_layout_of_a_folder_is_read(build: Callable[[Path], None], tmp_path: Path) -> None:
    build(tmp_path)
    store = TensorStore.open(tmp_path)
    assert sorted(store) == ["a", "b"]
    assert (store["b"].dtype, store["b"].shape, store["b"].nbytes) == (torch.bfloat16, (4,), 8)
    assert store["a"].file in store.files
    for _ in range(2):
        assert torch.equal(store.read("a"), A)
        assert torch.equal(store.read("b"), B)
        assert not store.read("b").requires_grad
        store.release("a")
        store.close()  # reading again opens again


@pytest.mark.parametrize("large", [True, False])
def test_reading_never_writes_the_file_and_a_large_tensor_shares_its_pages(tmp_path: Path, large: bool) -> None:
    expected = torch.arange(SMALL_BYTES if large else 6, dtype=torch.float32)
    save_file({"a": expected}, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)
    view = store.read("a")
    assert (view.data_ptr() == store.read("a").data_ptr()) is large
    view.zero_()
    assert torch.equal(TensorStore.open(tmp_path).read("a"), expected)


@pytest.mark.parametrize("large", [True, False])
def test_view_outlives_the_store(tmp_path: Path, large: bool) -> None:
    expected = torch.arange(SMALL_BYTES if large else 6, dtype=torch.float32)
    save_file({"a": expected}, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)
    view = store.read("a")
    store.close()
    del store
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(view, expected)


def resident_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_release_gives_memory_back_and_keeps_neighbours(tmp_path: Path) -> None:
    size = 32 * 2**20
    save_file({"a": torch.ones(5), "big": torch.ones(size, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)
    store.release("big")  # not mapped yet
    big, small = store.read("big"), store.read("a")
    assert (big.sum(), small.sum()) == (size, 5)
    before = resident_bytes()
    store.release("big")
    assert before - resident_bytes() > size // 2
    assert (big.sum(), small.sum()) == (size, 5)


def test_unaligned_scalar_and_empty_tensors(tmp_path: Path) -> None:
    header = {
        "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "scalar": {"dtype": "I8", "shape": [], "data_offsets": [9, 10]},
        "none": {"dtype": "F16", "shape": [3, 0], "data_offsets": [10, 10]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    data = b"\7" + torch.tensor([1.5, -2.0]).numpy().tobytes() + b"\5"
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    store = TensorStore.open(tmp_path)
    assert store.read("odd").tolist() == [1.5, -2.0]
    assert store.read("odd").data_ptr() % 4 == 0
    assert store.read("scalar").item() == 5
    assert store.read("none").shape == (3, 0)
    for name in store:
        store.release(name)


@pytest.mark.parametrize("build", [single, single_bin])
def test_replaced_file_changes_identity_and_is_not_read(build: Callable[[Path], None], tmp_path: Path) -> None:
    build(tmp_path)
    store = TensorStore.open(tmp_path)
    before = store.identity("a")
    view = store.read("a")
    assert store.identity("a") == before == TensorStore.open(tmp_path).identity("a")
    file = store["a"].file
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    copy.rename(file)
    assert store.identity("a") != before
    with raises(CheckpointError, file):
        store.read("a")
    assert torch.equal(view, A)
    assert torch.equal(TensorStore.open(tmp_path).read("a"), A)


@pytest.mark.parametrize("build", [single, single_bin])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_file_truncated_or_removed_after_open(build: Callable[[Path], None], is_mapped: bool, tmp_path: Path) -> None:
    build(tmp_path)
    store = TensorStore.open(tmp_path)
    if is_mapped:
        store.read("a")
    file = store["a"].file
    size = file.stat().st_size
    os.truncate(file, 16)
    with raises(CheckpointError, file, size, 16):
        store.read("a")
    file.unlink()
    with raises(CheckpointError, file):
        store.read("a")
    with raises(CheckpointError, file):
        store.identity("a")


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)

    def check(name: str) -> bool:
        is_equal = torch.equal(store.read(name), tensors[name])
        store.release(name)
        return is_equal

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, list(tensors) * 10))


def test_unknown_name(tmp_path: Path) -> None:
    single(tmp_path)
    store = TensorStore.open(tmp_path)
    with raises(CheckpointError, "nope"):
        store.read("nope")
    with pytest.raises(KeyError):
        store["nope"]


# --- folders that are refused ---------------------------------------------------------------------------------------


def missing_shard(folder: Path) -> None:
    indexed(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def missing_shard_without_index(folder: Path) -> None:
    two_shards(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()


def missing_pickle(folder: Path) -> None:
    bin_shards(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def extra_shard(folder: Path) -> None:
    save_file({"a": A, "b": B}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": B}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, dict.fromkeys("ab", "model-00001-of-00002.safetensors"))


def index_names_unknown_tensor(folder: Path) -> None:
    single(folder)
    write_index(folder, {"a": "model.safetensors", "b": "model.safetensors", "ghost": "model.safetensors"})


def index_leaves_tensor_out(folder: Path) -> None:
    single(folder)
    write_index(folder, {"a": "model.safetensors"})


def index_swaps_shards(folder: Path) -> None:
    two_shards(folder)
    write_index(folder, {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"})


def tensor_in_two_shards(folder: Path) -> None:
    save_file({"a": A}, folder / "one.safetensors")
    save_file({"a": A}, folder / "two.safetensors")


def two_indices(folder: Path) -> None:
    two_shards(folder)
    write_index(folder, {}, "x.safetensors.index.json")
    write_index(folder, {}, "y.safetensors.index.json")


def index_to(name: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        single(folder)
        save_file({"a": A}, folder.parent / "secret.safetensors")
        write_index(folder, {"a": name})

    return build


def index_text(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(text)

    return build


def link_to(target: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        save_file({"a": A}, folder.parent / "secret.safetensors")
        (folder / "model.safetensors").symlink_to(target)

    return build


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def only_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def only_empty_files(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")


REFUSED_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (lambda folder: None, "nothing"),
    "no weights": (only_config, "['config.json']"),
    "no tensors": (only_empty_files, "tensors"),
    "missing shard": (missing_shard, "'model-00002-of-00002.safetensors'"),
    "missing shard without an index": (missing_shard_without_index, "'model-00001-of-00002.safetensors'"),
    "missing pickle": (missing_pickle, "'pytorch_model-00002-of-00002.bin'"),
    "extra shard": (extra_shard, "'model-00002-of-00002.safetensors'"),
    "index names an unknown tensor": (index_names_unknown_tensor, "'ghost'"),
    "index leaves a tensor out": (index_leaves_tensor_out, "'b'"),
    "index swaps the shards": (index_swaps_shards, "'model-00002-of-00002.safetensors'"),
    "tensor in two shards": (tensor_in_two_shards, "'a'"),
    "two index files": (two_indices, "'y.safetensors.index.json'"),
    "index goes up": (index_to("../secret.safetensors"), "'../secret.safetensors'"),
    "index is absolute": (index_to("/etc/secret.safetensors"), "'/etc/secret.safetensors'"),
    "index has a backslash": (index_to("..\\secret.safetensors"), "secret.safetensors'"),
    "index has a null byte": (index_to("\0.safetensors"), r"'\x00.safetensors'"),
    "index names another kind of file": (index_to("pytorch_model.bin"), "'pytorch_model.bin'"),
    "index maps to a number": (index_to(3), "3"),
    "index is not json": (index_text("{"), "model.safetensors.index.json"),
    "index is a list": (index_text("[1]"), "[1]"),
    "index without weight_map": (index_text('{"metadata":{}}'), "weight_map None"),
    "index with an empty weight_map": (index_text('{"weight_map":{}}'), "weight_map {}"),
    "index with repeated tensors": (index_text('{"weight_map":{"a":"x","a":"y"}}'), "'a'"),
    "link out of the folder": (link_to("../secret.safetensors"), "secret.safetensors"),
    "link to nowhere": (link_to("nowhere"), "model.safetensors"),
    "link to itself": (link_to("model.safetensors"), "model.safetensors"),
    "named pipe": (pipe, "model.safetensors"),
    "folder for a file": (lambda folder: (folder / "model.safetensors").mkdir(), "model.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_folder_is_refused_by_value(case: str, tmp_path: Path) -> None:
    build, value = REFUSED_FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder)
    with raises(CheckpointError, value, folder) as caught:
        TensorStore.open(folder)
    assert caught.value.remedy


@pytest.mark.parametrize("method", ["is_dir", "iterdir"])
def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    indexed(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with raises(CheckpointError, tmp_path):
            TensorStore.open(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with raises(CheckpointError, tmp_path / "gone"):
        TensorStore.open(tmp_path / "gone")


def test_hub_cache_links_are_followed_within_their_repository_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    folder = repository / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file({"a": A}, repository / "blobs" / "hash")
    (folder / "model.safetensors").symlink_to("../../blobs/hash")
    assert torch.equal(TensorStore.open(folder).read("a"), A)

    (repository / "blobs" / "hash").rename(tmp_path / "hash")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../../hash")
    with raises(CheckpointError, folder / "model.safetensors", tmp_path / "hash"):
        TensorStore.open(folder)


# --- pickles ----------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


def recompressed(file: Path) -> None:
    torch.save({"a": A}, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


REFUSED_PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda file: torch.save({"a": Canary(file.parent / "fired")}, file), "mkdir"),
    "code beside tensors": (lambda file: torch.save({"a": A, "z": Canary(file.parent / "fired")}, file), "mkdir"),
    "bare pickle": (lambda file: file.write_bytes(pickle.dumps(Canary(file.parent / "fired"))), "pytorch_model.bin"),
    "legacy torch file": (
        lambda file: torch.save({"a": A}, file, _use_new_zipfile_serialization=False),
        "pytorch_model.bin",
    ),
    "whole module": (lambda file: torch.save(torch.nn.Linear(2, 2), file), "Linear"),
    "script": (lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file), "code/__torch__"),
    "compressed": (recompressed, "compressed"),
    "list": (lambda file: torch.save([A], file), "list"),
    "entry that is no tensor": (lambda file: torch.save({"a": A, "epoch": 7}, file), "'epoch'"),
    "nested state dict": (lambda file: torch.save({"state_dict": {"a": A}}, file), "'state_dict'"),
    "key that is a number": (lambda file: torch.save({5: A}, file), "5"),
    "expanded": (lambda file: torch.save({"a": torch.zeros(1).expand(2**40)}, file), str(2**40)),
    "sparse": (lambda file: torch.save({"a": A.to_sparse()}, file), "torch.sparse_coo"),
    "unserved dtype": (lambda file: torch.save({"a": A.to(torch.complex64)}, file), "complex64"),
    "empty": (lambda file: file.write_bytes(b""), "pytorch_model.bin"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REFUSED_PICKLES)
def test_pickle_is_refused_and_runs_nothing(case: str, tmp_path: Path) -> None:
    build, value = REFUSED_PICKLES[case]
    build(tmp_path / "pytorch_model.bin")
    with raises(CheckpointError, value) as caught:
        TensorStore.open(tmp_path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "fired").exists()


def test_canary_works(tmp_path: Path) -> None:
    torch.save({"a": Canary(tmp_path / "fired")}, tmp_path / "pytorch_model.bin")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "fired").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_raise_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(21)
    torch.save({"a": A, "b": B}, tmp_path / "valid")
    valid = (tmp_path / "valid").read_bytes()
    for attempt in range(200):
        content = bytearray(valid)
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(len(content))] = rng.choice([0, 127, 255, rng.randrange(256)])
        file = tmp_path / f"{attempt}.bin"
        file.write_bytes(content)
        try:
            shard = PickleShard(file)
            for entry in shard.entries:
                shard.read(entry).clone()
        except CheckpointError:
            pass
