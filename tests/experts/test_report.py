"""Exports parse back, and are written complete, inside their folder, or not at all."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amalgam.errors import ConfigError, RequestError
from amalgam.experts.export.parquet import write_parquet
from amalgam.experts.export.png import heatmap_png
from amalgam.experts.export.report import FORMATS, export
from amalgam.experts.overview import build_overview
from amalgam.experts.saved.files import from_bytes
from amalgam.experts.saved.folder import write_file
from amalgam.experts.statistics import expert_columns
from amalgam.experts.tracker import ExpertTracker
from tests.errors import raises
from tests.experts.routing import LAYER_IDS, Clock, make_tracker, route, run_step, run_tokens, span

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def tracker() -> ExpertTracker:
    clock = Clock()
    tracker = make_tracker(clock)
    clock.now += 1.5
    run_tokens(tracker, 3)
    return tracker


def test_json_holds_the_whole_answer(tracker: ExpertTracker) -> None:
    result = export(tracker)
    assert (result.file_name, result.media_type) == ("expert_stats_19700112T134641.500000Z.json", "application/json")
    assert json.loads(result.content) == build_overview(tracker, None).as_json()


def test_csv_holds_a_line_per_expert(tracker: ExpertTracker) -> None:
    result = export(tracker, "csv")
    assert result.file_name.endswith(".csv")
    assert result.media_type == "text/csv"
    lines = list(csv.DictReader(io.StringIO(result.content.decode())))
    expected = build_overview(tracker, None).as_json()["expert_stats"]
    assert [list(line) for line in lines] == [list(row) for row in expected]
    for line, row in zip(lines, expected, strict=True):
        assert {name: float(text) if text else None for name, text in line.items()} == row


def test_parquet_is_read_back_by_the_usual_library(tracker: ExpertTracker) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is a development dependency")
    result = export(tracker, "parquet")
    table = parquet.read_table(io.BytesIO(result.content))
    assert table.to_pydict() == expert_columns(tracker.snapshot())
    assert str(table.schema.field("activation_count").type) == "int64"
    assert table.column("last_activation").null_count > 0
    columns: dict[str, list[Any]] = {
        "a": list(range(-500, 500)),
        "b": [None if i % 7 else i / 3 for i in range(1000)],
        **{f"c{i}": [i] * 1000 for i in range(20)},
    }
    assert parquet.read_table(io.BytesIO(write_parquet(columns))).to_pydict() == columns
    assert parquet.read_table(io.BytesIO(write_parquet({"a": []}))).num_rows == 0


def test_parquet_has_its_frame_and_its_values(tracker: ExpertTracker) -> None:
    content = export(tracker, "parquet").content
    assert content[:4] == content[-4:] == b"PAR1"
    (length,) = struct.unpack("<I", content[-8:-4])
    assert b"activation_count" in content[-8 - length : -8]
    counts = expert_columns(tracker.snapshot())["activation_count"]
    assert np.array(counts, "<i8").tobytes() in content


def test_npz_is_a_saved_set(tracker: ExpertTracker) -> None:
    saved = from_bytes(export(tracker, "npz").content, "it")
    np.testing.assert_array_equal(saved.total.counts, tracker.snapshot().tally.counts)
    assert saved.layer_ids == LAYER_IDS
    with np.load(io.BytesIO(export(tracker, "npz").content)) as arrays:
        assert arrays["counts"].sum() == 3 * 2 * len(LAYER_IDS)


def decode_png(content: bytes) -> np.ndarray:
    """The pixels of a PNG of our kind; checks every chunk."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(kind + data)
        chunks[kind], place = data, place + 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_shows_hot_red_cold_blue_and_unused_grey() -> None:
    relative = np.ones((3, 8))
    relative[0, 0], relative[1, 1], relative[2, 2] = 8, 1 / 8, 0
    pixels = decode_png(heatmap_png(relative, LAYER_IDS)).astype(int)
    left, top, cell = 60, 40, 32
    hot, cold, unused, even = (
        pixels[top + cell * row + 16, left + cell * expert + 16] for row, expert in ((0, 0), (1, 1), (2, 2), (0, 5))
    )
    assert hot[0] > 2 * hot[2]
    assert cold[2] > 2 * cold[0]
    assert len(set(unused.tolist())) == 1 and unused[0] < 100
    assert even.min() > 240


@pytest.mark.parametrize("shape", [(1, 2), (94, 128), (3, 512)])
def test_png_of_any_size(shape: tuple[int, int]) -> None:
    pixels = decode_png(heatmap_png(np.ones(shape), range(shape[0])))
    assert pixels.shape[1] < 2400


def test_png_has_a_title_axes_and_a_legend() -> None:
    def drawn(captions: tuple[str, ...]) -> np.ndarray:
        return (decode_png(heatmap_png(np.ones((3, 8)), LAYER_IDS, captions)) == 40).all(axis=-1)

    bare, titled = drawn(()), drawn(("Demo", "10 tokens"))
    height = titled.shape[0] - bare.shape[0]
    np.testing.assert_array_equal(titled[height + 8 :], bare[8:])
    assert bare[:40, 60:108].any() and bare[24:40, :60].any()  # EXPERT above the numbers, LAYER beside them
    assert bare[:, -100:].any()  # what the colours mean
    lines = [titled[8:18], titled[24:34]]
    assert all(line.any() for line in lines) and not titled[18:24].any()
    np.testing.assert_array_equal(drawn(("dEMO", "10 tokens")), titled)
    assert (drawn(("Memo", "10 tokens")) != titled).any()
    hostile = ("<script>\n明月\ud800" * 100, "\x1b[31m")  # cut, and marks for what has no letter
    assert drawn(hostile).shape == titled.shape


def test_the_picture_names_its_model(tracker: ExpertTracker) -> None:
    first, second = (decode_png(export(tracker, "png", model=name).content) for name in ("demo", "other"))
    assert first.shape == second.shape and (first != second).any()
    assert (first[40:] == second[40:]).all()


class Page(HTMLParser):
    """Tags, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)


def test_html_is_self_contained_and_names_are_inert() -> None:
    tracker, rng = make_tracker(Clock()), np.random.default_rng(0)
    tracker.admit(0, HOSTILE, 0)
    run_step(tracker, [span(300, label=HOSTILE)], route(rng, 300))
    text = export(tracker, "html", model=HOSTILE).content.decode()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 3  # title, heading, domain
    icon, image = page.addresses
    assert icon == "data:," and image.startswith("data:image/png;base64,")
    assert "300" in text and "Balance" in text


def test_a_model_without_traffic_exports_too() -> None:
    tracker = make_tracker(Clock())
    for name in FORMATS:
        assert export(tracker, name).content


@pytest.mark.parametrize("format_name", ["xml", "", "JSON", None, 3, ["json"]])
def test_an_unknown_format_is_refused(tracker: ExpertTracker, format_name: Any) -> None:
    with raises(RequestError, "format", "json", "csv", "parquet", "npz", "png", "html"):
        export(tracker, format_name)


def test_a_window_is_exported(tracker: ExpertTracker) -> None:
    assert json.loads(export(tracker, minutes=5).content)["window"]["minutes"] == 5
    with raises(RequestError, "minutes", "npz"):
        export(tracker, "npz", minutes=5)


def test_a_file_is_written_complete(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "exports"
    path = write_file(folder, "a.csv", "x,y\n1,é\n")
    assert path.read_bytes() == "x,y\n1,é\n".encode()
    write_file(folder, "a.csv", b"again")
    assert {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()} == {"a.csv": "again"}


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/b", "a\\b", "", ".", "..", ".hidden", "a\n", "a\0", "a" * 213])
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with raises(RequestError):
        write_file(tmp_path / "exports", name, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "exports"
    outside.write_text("untouched")
    folder.mkdir()
    (folder / "a.json").symlink_to(outside)
    write_file(folder, "a.json", "{}")
    assert outside.read_text() == "untouched"
    assert (folder / "a.json").read_text() == "{}"


def test_a_full_folder_takes_no_more_files(tmp_path: Path) -> None:
    for index in range(1000):
        (tmp_path / f"{index}.json").touch()
    with raises(ConfigError, tmp_path, 1000, "server.export_dir"):
        write_file(tmp_path, "a.json", "{}")
    assert not (tmp_path / "a.json").exists()
    assert write_file(tmp_path, "7.json", "{}").read_text() == "{}"  # in place of the old one
    (tmp_path / "8.json").unlink()
    assert write_file(tmp_path, "a.json", "{}").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with raises(ConfigError, tmp_path, "server.export_dir"):
        write_file(tmp_path, "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        write_file(tmp_path / "file", "a.json", "{}")
