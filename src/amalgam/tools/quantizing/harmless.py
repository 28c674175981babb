"""A checkpoint as another tool is given it: nothing in it names or holds a program.

In: an opened checkpoint, a folder. Out: links to its weights in that folder, copies of what stands beside them. Must
never know the tool.

Tools ask transformers for parts of a model in many places, and not in all of them they pass on that no code may be run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amalgam.base.strict_json import parse_json
from amalgam.composition.carry import carry_files, write_json
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.source import Source

_NAMES_CODE = "auto_map"
_DATA = ("tokenizer.json", "vocab.json")  # large, and transformers looks for no code there


def without_code(source: Source, folder: Path) -> None:
    """
    Args:
        source: of safetensors files.
        folder: is made.

    Raises:
        CheckpointError: a file leads out of the checkpoint's folder.
        OSError: there is no room.
    """
    folder.mkdir()
    carry_files(source.store, folder)
    for file in folder.glob("*.json"):
        if file.name not in _DATA:
            _remove_names(file)
    write_json(folder / CONFIG_NAME, _pruned(dict(source.config)))
    files = source.store.files
    if len(files) == 1:
        (folder / "model.safetensors").symlink_to(files[0].absolute())
        return
    for file in files:
        (folder / file.name).symlink_to(file.absolute())
    places = {name: entry.file.name for name, entry in source.store.items()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _remove_names(file: Path) -> None:
    try:
        found = parse_json(file.read_bytes())
    except ValueError:  # a tool could read it otherwise
        file.unlink()
        return
    write_json(file, _pruned(found))


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if key != _NAMES_CODE}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value
