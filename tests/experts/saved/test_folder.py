"""Saved sets are found under their names, in their folder and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amalgam.errors import RequestError
from amalgam.experts.saved.files import save
from amalgam.experts.saved.folder import list_names, load_named, save_named
from amalgam.experts.saved.sets import merge
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
