"""Saved sets are found under their names, in their folder and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amalgam.errors import ConfigError, RequestError
from amalgam.experts.history import Tally
from amalgam.experts.saved import folder as module
from amalgam.experts.saved.files import save
from amalgam.experts.saved.folder import list_names, load_named, save_named
from amalgam.experts.saved.sets import SavedSet, merge
from tests.errors import raises
from tests.experts.routing import busy_tracker

ENDINGS = (".npz", ".safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../a", "/etc/passwd", "a/b", "", ".", "..", ".x", "a\n", "a\0", "<b>", "a" * 201, ".npz", ".safetensors",
        "a.npz.npz", "a.npz.safetensors", None,
    ],
)  # fmt: skip
def test_names_stay_in_their_folder(tmp_path: Path, name: Any) -> None:
    with raises(RequestError, "name"):
        load_named(tmp_path, name)
    with raises(RequestError, "name"):
        save_named(tmp_path, name, busy_tracker(0).saved_set())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "a.b", "npz", "x.npz", "x.safetensors", "a" * 196, "a" * 197, "a" * 200])
def test_a_set_is_found_under_the_name_it_was_saved_by(tmp_path: Path, name: str) -> None:
    path = save_named(tmp_path, name, busy_tracker(0).saved_set())
    plain = name.removesuffix(".npz").removesuffix(".safetensors")
    assert path.name == f"{plain}.safetensors"
    (tmp_path / "x.npz.npz").write_bytes(b"of somebody else")  # no name leads to it
    assert list_names(tmp_path) == [plain]
    assert load_named(tmp_path, list_names(tmp_path)[0]).total.num_tokens.sum() == 10


def test_a_set_of_before_is_found_and_replaced(tmp_path: Path) -> None:
    old, new = busy_tracker(0).saved_set(), merge([busy_tracker(1).saved_set()] * 2)
    save(old, tmp_path / "a.npz")
    assert list_names(tmp_path) == ["a"]
    assert load_named(tmp_path, "a").total.num_tokens.sum() == 10
    save_named(tmp_path, "a.npz", new)
    assert load_named(tmp_path, "a.npz").total.num_tokens.sum() == 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_folder_takes_sets_in_place_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 1)
    saved = busy_tracker(0).saved_set()
    save(saved, tmp_path / f"a{ending}")
    with raises(ConfigError, 1, tmp_path):
        save_named(tmp_path, "b", saved)
    save_named(tmp_path, "a", saved)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_link_is_no_saved_set(tmp_path: Path, ending: str) -> None:
    outside = tmp_path / f"outside{ending}"
    save(busy_tracker(0).saved_set(), outside)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"a{ending}").symlink_to(outside)
    assert list_names(folder) == []
    with raises(RequestError, "a"):
        load_named(folder, "a")
    save_named(folder, "a", busy_tracker(0).saved_set())  # in its place
    assert outside.exists() and [path.is_symlink() for path in folder.iterdir()] == [False]


def many_labels(num_sets: int, padding: str) -> list[SavedSet]:
    """Sets of 64 labels of 64 characters each, on a model of one layer of 8 experts."""
    grid = (1, 8)
    total = replace(busy_tracker(0).saved_set(), layer_ids=(0,), total=Tally.zeros(*grid), pairs=None)
    sets = []
    for first in range(0, num_sets * 64, 64):
        labels = {f"{number:04}{padding * 60}": Tally.zeros(*grid) for number in range(first, first + 64)}
        sets.append(replace(total, last_activation=total.last_activation[:1], labels=labels))
    return sets


@pytest.mark.parametrize(("num_sets", "padding"), [(41, "é"), (41, "\\"), (60, "\N{FACE WITH TEARS OF JOY}")])
def test_many_labels_are_read_again(tmp_path: Path, num_sets: int, padding: str) -> None:
    together = merge(many_labels(num_sets, padding))
    save_named(tmp_path, "a", together)
    save(together, tmp_path / "b.npz")
    for name in ("a", "b"):
        assert list(load_named(tmp_path, name).labels) == list(together.labels)


@pytest.mark.parametrize(("num_sets", "padding"), [(80, "\N{FACE WITH TEARS OF JOY}"), (72, '"')])
def test_more_labels_than_a_file_can_hold_replace_nothing(tmp_path: Path, num_sets: int, padding: str) -> None:
    """The quotes are escaped in the text, and once more in the header."""
    save_named(tmp_path, "a", many_labels(1, padding)[0])
    before = (tmp_path / "a.safetensors").read_bytes()
    with raises(ConfigError, 64 * num_sets, 2**20):
        save_named(tmp_path, "a", merge(many_labels(num_sets, padding)))
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_more_labels_than_an_npz_can_hold_are_refused(tmp_path: Path) -> None:
    with raises(ConfigError, 64 * 80, 2**20):
        save(merge(many_labels(80, "\N{FACE WITH TEARS OF JOY}")), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []
