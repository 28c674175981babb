"""GGUF files: what the official writer makes is read; what nobody should make is refused by name, quickly."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.errors import raises

from amalgam.checkpoint import TensorStore, resolve
from amalgam.checkpoint import gguf as header
from amalgam.errors import CheckpointError

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, sizes: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def blob(
    pairs: Sequence[bytes] = (ARCHITECTURE,),
    tensors: Sequence[bytes] = (),
    *,
    data: int = 4096,
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
) -> bytes:
    """A GGUF file with `data` bytes of data, whose counts may lie."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(pairs) if num_pairs is None else num_pairs)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


def write(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def official(file: Path, tensors: dict[str, np.ndarray], **options: Any) -> Path:
    """What the `gguf` package writes, metadata of every type included."""
    writer = gguf.GGUFWriter(file, "llama", **options)
    writer.add_uint32("llama.block_count", 7)
    writer.add_int64("x.negative", -5)
    writer.add_float32("x.float", 1e-6)
    writer.add_bool("x.flag", True)
    writer.add_string("x.text", "ä\n{{ template }}")
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_array("x.strings", ["a", "", "ü"])
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if array.dtype == np.uint8 else None
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 64)).astype(np.float32)
    return {
        "norm.weight": weight[0],
        "wide.weight": weight,
        "half.weight": weight.astype(np.float16),
        "stack.weight": rng.standard_normal((3, 2, 5)).astype(np.float32),
        "packed.weight": gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0),
    }


class TestReading:
    def test_what_the_official_writer_makes(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        store = TensorStore.open(official(tmp_path / "model.gguf", arrays))
        assert set(store) == set(arrays)
        for name, array in arrays.items():
            assert torch.equal(store.read(name), torch.from_numpy(array)), name
            assert store[name].encoding == ("Q8_0" if name == "packed.weight" else None)
        found = dict(store.metadata)
        assert found["llama.block_count"] == 7
        assert found["x.negative"] == -5
        assert found["x.float"] == pytest.approx(1e-6)
        assert found["x.flag"] is True
        assert found["x.text"] == "ä\n{{ template }}"
        assert list(found["x.numbers"]) == [1, 2, 3]
        assert (list(found["x.strings"]), found["x.strings"][2], len(found["x.strings"])) == (["a", "", "ü"], "ü", 3)

    def test_a_folder_with_one_file(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        official(tmp_path / "anything.gguf", arrays)
        assert set(TensorStore.open(tmp_path)) == set(arrays)

    def test_a_part_of_a_tensor(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        store = TensorStore.open(official(tmp_path / "model.gguf", arrays))
        part = store["stack.weight"].part(10, (2, 5))
        assert torch.equal(store.read(part), torch.from_numpy(arrays["stack.weight"][1]))
        store.release(part)
        assert store.identity(part) == store.identity("stack.weight")

    def test_a_gguf_file_is_a_checkpoint(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        file = official(tmp_path / "model.gguf", arrays)
        assert resolve(str(file)) == file

    def test_safetensors_come_first(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        official(tmp_path / "model.gguf", arrays)
        save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
        assert set(TensorStore.open(tmp_path)) == {"x"}

    def test_alignment(self, tmp_path: Path) -> None:
        content = blob([ARCHITECTURE, pair("general.alignment", U32, struct.pack("<I", 8))], [tensor("x", [2], 0, 8)])
        (entry,) = header.read_header(write(tmp_path, content)).entries
        assert entry.offset is not None
        assert entry.offset % 8 == 0

    def test_a_vocabulary_of_half_a_million_strings_is_stepped_over(self, tmp_path: Path) -> None:
        strings = b"".join(text(f"token{i}") for i in range(500_000))
        content = pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 500_000) + strings)
        file = write(tmp_path, blob([ARCHITECTURE, content]))
        started = time.process_time()
        metadata = header.read_header(file).metadata
        assert time.process_time() - started < 10
        assert metadata["tokenizer.ggml.tokens"][499_999] == "token499999"


class TestSplit:
    @pytest.fixture
    def parts(self, tmp_path: Path, arrays: dict[str, np.ndarray]) -> list[Path]:
        official(tmp_path / "model.gguf", arrays, split_max_tensors=2)
        files = sorted(tmp_path.glob("*.gguf"))
        assert [file.name for file in files] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        return files

    def test_any_part_or_the_folder_opens_all(self, parts: list[Path], arrays: dict[str, np.ndarray]) -> None:
        for path in (*parts, parts[0].parent):
            store = TensorStore.open(path)
            assert set(store) == set(arrays)
            assert store.metadata["llama.block_count"] == 7
            assert all(torch.equal(store.read(name), torch.from_numpy(array)) for name, array in arrays.items())

    def test_a_missing_part(self, parts: list[Path]) -> None:
        parts[1].unlink()
        for path in (parts[0], parts[0].parent):
            with raises(CheckpointError, "model-00002-of-00003.gguf"):
                TensorStore.open(path)

    def test_a_part_under_a_wrong_name(self, parts: list[Path]) -> None:
        content = parts[1].read_bytes()
        parts[1].write_bytes(parts[2].read_bytes())
        parts[2].write_bytes(content)
        with raises(CheckpointError, "model-00002-of-00003.gguf", "split.no = 2"):
            TensorStore.open(parts[0])

    def test_a_part_by_itself(self, parts: list[Path]) -> None:
        with raises(CheckpointError, "model.gguf", "split.count = 3"):
            TensorStore.open(parts[0].rename(parts[0].with_name("model.gguf")))

    def test_a_part_twice(self, parts: list[Path]) -> None:
        """The same tensors under two part numbers."""
        content = parts[1].read_bytes()
        number = content.index(b"split.no") + len("split.no") + 4
        parts[2].write_bytes(content[:number] + struct.pack("<H", 2) + content[number + 2 :])
        with raises(CheckpointError, "split.tensors.count = 5", 6):
            TensorStore.open(parts[0])

    def test_several_models_in_one_folder(self, parts: list[Path], arrays: dict[str, np.ndarray]) -> None:
        official(parts[0].with_name("other.gguf"), arrays)
        with raises(CheckpointError, "other.gguf", *(part.name for part in parts)):
            TensorStore.open(parts[0].parent)

    def test_a_part_outside_of_the_folder(self, parts: list[Path], tmp_path: Path) -> None:
        outside = tmp_path / "elsewhere"
        outside.mkdir()
        parts[1].rename(outside / parts[1].name)
        parts[1].symlink_to(outside / ".." / ".." / tmp_path.name / "elsewhere" / parts[1].name)
        inside = tmp_path / "inside"
        inside.mkdir()
        for part in (parts[0], parts[2]):
            part.rename(inside / part.name)
        parts[1].rename(inside / parts[1].name)
        with raises(CheckpointError, outside / parts[1].name):
            TensorStore.open(inside / parts[0].name)


def number(key: str, kind: int, code: str, value: float) -> bytes:
    return pair(key, kind, struct.pack("<" + code, value))


def array_of(kind: int, count: int, content: bytes = b"") -> bytes:
    return pair("x", ARRAY, struct.pack("<IQ", kind, count) + content)


HUGE = 2**63
MALFORMED: dict[str, tuple[Callable[[], bytes], object]] = {
    "empty": (lambda: b"", "b''"),
    "magic": (lambda: b"GGML" + blob()[4:], "b'GGML'"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "only magic": (lambda: b"GGUF", "version at byte 4"),
    "version 1": (lambda: blob(version=1), "version 1"),
    "version 4": (lambda: blob(version=4), "version 4"),
    "big-endian": (lambda: blob(version=3 << 24), "big-endian"),
    "tensor count": (lambda: blob(num_tensors=HUGE), HUGE),
    "tensor count by one": (lambda: blob(num_tensors=1, data=0), "tensor 0"),
    "tensors that fit no file": (lambda: blob(num_tensors=60_000), 60_000),
    "pair count": (lambda: blob(num_pairs=HUGE), HUGE),
    "pairs that fit no file": (lambda: blob(num_pairs=60_000), 60_000),
    "pair count by one": (lambda: blob(num_pairs=2), "metadata 1"),
    "key length": (lambda: blob([struct.pack("<Q", HUGE)], data=64), HUGE),
    "key unprintable": (lambda: blob([pair("a\nb", U8, b"\0")]), repr("a\nb")),
    "key not UTF-8": (lambda: blob([pair(b"\xff\xfe", U8, b"\0")]), "UTF-8"),
    "key twice": (lambda: blob([ARCHITECTURE, ARCHITECTURE]), "general.architecture"),
    "value type": (lambda: blob([pair("x", 13, b"")]), "type 13"),
    "string length": (lambda: blob([pair("x", STRING, struct.pack("<Q", HUGE))]), HUGE),
    "string past the end": (lambda: blob([pair("x", STRING, struct.pack("<Q", 90_000))]), 90_000),
    "string not UTF-8": (lambda: blob([pair("x", STRING, text(b"\xc3("))]), "UTF-8"),
    "boolean": (lambda: blob([pair("x", BOOL, b"\2")]), "'x' = 2"),
    "array count": (lambda: blob([array_of(U8, HUGE)]), HUGE),
    "array past the end": (lambda: blob([array_of(U64, 100_000)]), 100_000),
    "array of arrays": (lambda: blob([array_of(ARRAY, 1, struct.pack("<IQ", U8, 0))]), "type 9"),
    "array of strings past the end": (lambda: blob([array_of(STRING, 3, text("a") + struct.pack("<Q", HUGE))]), "'x'"),
    "too many strings": (lambda: blob([array_of(STRING, 2**22)]), 2**21),
    "no architecture": (lambda: blob([pair("x", U8, b"\0")]), "general.architecture = None"),
    "architecture is a number": (lambda: blob([number("general.architecture", U32, "I", 3)]), "architecture = 3"),
    "alignment 0": (lambda: blob([ARCHITECTURE, number("general.alignment", U32, "I", 0)]), "alignment = 0"),
    "alignment 24": (lambda: blob([ARCHITECTURE, number("general.alignment", U32, "I", 24)]), "alignment = 24"),
    "alignment huge": (
        lambda: blob([ARCHITECTURE, number("general.alignment", U32, "I", 2**31)]),
        2**31,
    ),
    "alignment is text": (
        lambda: blob([ARCHITECTURE, pair("general.alignment", STRING, text("32"))]),
        "= '32'",
    ),
    "rank 0": (lambda: blob(tensors=[tensor("w", [])]), "0 dimensions"),
    "rank 5": (lambda: blob(tensors=[tensor("w", [1] * 5)]), "5 dimensions"),
    "rank huge": (lambda: blob(tensors=[text("w") + struct.pack("<I", 2**32 - 1)]), "4294967295 dimensions"),
    "size 0": (lambda: blob(tensors=[tensor("w", [4, 0])]), [4, 0]),
    "size overflow": (lambda: blob(tensors=[tensor("w", [2**32, 2**32])]), [2**32, 2**32]),
    "row of no whole blocks": (lambda: blob(tensors=[tensor("w", [48, 2], 2)]), "Q4_0"),
    "type unknown": (lambda: blob(tensors=[tensor("w", [32], 97)]), 97),
    "type removed": (lambda: blob(tensors=[tensor("w", [32], 4)]), 4),
    "type IQ2_XXS": (lambda: blob(tensors=[tensor("w", [256], 16)]), "IQ2_XXS"),
    "type TQ1_0": (lambda: blob(tensors=[tensor("w", [256], 34)]), "TQ1_0"),
    "offset unaligned": (lambda: blob(tensors=[tensor("w", [4], 0, 4)]), "offset 4"),
    "offset past the end": (lambda: blob(tensors=[tensor("w", [4], 0, 4096)]), "'w'"),
    "offset overflow": (lambda: blob(tensors=[tensor("w", [4], 0, 2**64 - 32)]), "'w'"),
    "tensor past the end": (lambda: blob(tensors=[tensor("w", [2**40])]), "'w'"),
    "data truncated": (lambda: blob(tensors=[tensor("w", [32], 8)], data=33), "'w'"),
    "overlap": (lambda: blob(tensors=[tensor("v", [64]), tensor("w", [4], 0, 32)]), "'v'"),
    "same place": (lambda: blob(tensors=[tensor("v", [4]), tensor("w", [4])]), "'v'"),
    "tensor twice": (lambda: blob(tensors=[tensor("w", [4]), tensor("w", [4], 0, 32)]), "'w'"),
    "tensor without name": (lambda: blob(tensors=[tensor("", [4])]), "tensor 0"),
    "tensor name too long": (lambda: blob(tensors=[tensor("w" * 2000, [4])]), 2000),
    "split alone": (lambda: blob([ARCHITECTURE, number("split.count", U32, "I", 2)]), "split.count = 2"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    make, named = MALFORMED[case]
    file = write(tmp_path, make())
    started = time.process_time()
    with raises(CheckpointError, named, file):
        TensorStore.open(file)
    assert time.process_time() - started < 10


def test_refusing_takes_neither_time_nor_memory(tmp_path: Path) -> None:
    """Sizes that a naive reader would allocate, in a sparse file that is large enough to hold some of them."""
    files = []
    for index, content in enumerate(
        (
            blob([array_of(U64, 2**30)]),
            blob([array_of(STRING, 2**30)]),
            blob([pair("x", STRING, struct.pack("<Q", 2**31))]),
            blob(num_tensors=2**24),
            blob(tensors=[tensor("w", [2**30, 2**10])]),
        )
    ):
        files.append(write(tmp_path, content, f"{index}.gguf"))
        with files[-1].open("r+b") as stream:
            stream.truncate(2**33)
    header.read_header(write(tmp_path, blob(), "good.gguf"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        started = time.process_time()
        with pytest.raises(CheckpointError):
            header.read_header(file)
        assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_300_mutations(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Nothing but CheckpointError, whatever byte is another, and never slowly."""
    good = official(tmp_path / "good.gguf", arrays).read_bytes()
    num_header = header.read_header(tmp_path / "good.gguf").entries[0].offset
    assert num_header is not None
    rng = random.Random(11)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            position = rng.randrange(num_header)
            kind = rng.randrange(4)
            if kind == 0:
                damaged[position] = rng.randrange(256)
            elif kind == 1:
                damaged[position : position + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)))
            elif kind == 2:
                del damaged[position : position + rng.randrange(1, 40)]
            else:
                damaged[position:position] = rng.randbytes(rng.randrange(1, 40))
        if rng.random() < 0.1:
            del damaged[rng.randrange(len(damaged)) :]
        file = write(tmp_path, bytes(damaged), "damaged.gguf")
        started = time.process_time()
        try:
            store = TensorStore.open(file)
            for name in store:
                store.read(name).clone()
            [list(value) for value in store.metadata.values() if isinstance(value, header.StringArray)]
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
        assert time.process_time() - started < 5
    assert outcomes["refused"] > 100
