"""What makes a checkpoint usable besides its weights: taken along into a new folder, or named as left out.

In: an opened checkpoint, a folder. Out: which tensors are in no written weight; tokenizer, chat templates, generation
defaults and licence in that folder, as files where the checkpoint has files and made from a GGUF file's metadata.
Must never know: what was done to the weights.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from amalgam.base.folders import member, member_folder
from amalgam.checkpoint.store import TensorStore
from amalgam.composition.check import HEAD, check_leftovers
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.source import Source
from amalgam.errors import AmalgamError
from amalgam.formats.fused import whole_of
from amalgam.formats.gguf.pieces import is_rope_table
from amalgam.models.spec import Family, ModelSpec
from amalgam.text.gguf.metadata import MODEL_KEY, build_tokenizer

# Tokenizers, templates, defaults; and a licence goes along with what it covers.
_COPIED = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
_COPIED_FOLDERS = {"additional_chat_templates": "*.jinja"}
_REPLACED = (CONFIG_NAME, "*.index.json")
_TEMPLATE_KEY = "tokenizer.chat_template"
_DRAFTS_KEY = "num_nextn_predict_layers"
LAYER = re.compile(r"(.*?\b(?:layers|blk)\.(\d{1,6}))\.")


def weights_besides(source: Source, family: Family, spec: ModelSpec, names: Collection[str]) -> list[str]:
    """Weights that the checkpoint holds beside the model's, to be copied; draft layers as a whole or not at all.

    Args:
        names: of the model's weights.

    Raises:
        CheckpointError: some are neither the model's nor the family's to be left over.
    """
    tied = {HEAD} if spec.has_tied_head else set()
    check_leftovers(source, family, spec, {*names, *tied})
    others = [name for name in source.weights if name not in names]
    wide = [name for name in others if source.weights[name].is_wide]
    if len(wide) < len(others):  # some are quantized: in what way, the new configuration cannot say
        drafts = set(drafts_among(wide, spec))
        wide = [name for name in wide if name not in drafts]
    return wide


def drafts_among(names: Iterable[str], spec: ModelSpec) -> list[str]:
    """Weights of layers behind the decoder's last one."""
    layers = ((name, LAYER.match(name)) for name in names)
    return [name for name, layer in layers if layer is not None and int(layer[2]) >= spec.num_layers]


def without_drafts(config: Mapping[str, Any], left_out: Iterable[str], spec: ModelSpec) -> dict[str, Any]:
    """What config.json has to say instead if its draft layers are left out."""
    is_said = config.get(_DRAFTS_KEY) and drafts_among(left_out, spec)
    return {_DRAFTS_KEY: 0} if is_said else {}


def left_out_tensors(source: Source, written: Iterable[str]) -> list[str]:
    """Tensors of a checkpoint that no weight in `written` comes from; tables of a GGUF file are in config.json."""
    used = {whole_of(part).name for name in written for part in source.weights[name].parts.values()}
    is_gguf = bool(source.store.metadata)
    return [name for name in source.store if name not in used and not (is_gguf and is_rope_table(name))]


def carry_files(store: TensorStore, folder: Path) -> list[str]:
    """Take along what stands beside the weights.

    Returns:
        What is left out: names, folders with a slash at the end; hidden ones are not named. And a sentence if a GGUF
        file has no tokenizer that could be made into files.

    Raises:
        CheckpointError: a file leads out of its folder, or cannot be read.
    """
    left_out = _copy(store, folder) if store.folder.is_dir() else []
    if store.metadata and not (folder / "tokenizer.json").exists():
        left_out += _write_tokenizer(store, folder)
    return left_out


def _copy(store: TensorStore, folder: Path) -> list[str]:
    left_out = []
    for path in sorted(store.folder.iterdir()):
        if path.name.startswith(".") or path in store.files or _fits(path.name, _REPLACED):
            continue
        if path.is_dir():
            left_out += _copy_folder(path, folder)
        elif _fits(path.name, _COPIED):
            shutil.copyfile(member(store.folder, path.name), folder / path.name)
        else:
            left_out.append(path.name)
    return left_out


def _copy_folder(path: Path, folder: Path) -> list[str]:
    pattern = _COPIED_FOLDERS.get(path.name)
    if pattern is None:
        return [f"{path.name}/"]
    source, left_out = member_folder(path.parent, path.name), []
    (folder / path.name).mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if fnmatchcase(file.name, pattern):
            shutil.copyfile(member(source, file.name), folder / path.name / file.name)
        else:
            left_out.append(f"{path.name}/{file.name}")
    return left_out


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _write_tokenizer(store: TensorStore, folder: Path) -> list[str]:
    """tokenizer.json and what belongs to it, so that the folder needs no GGUF file beside it."""
    metadata, where = store.metadata, str(store.files[0])
    if MODEL_KEY not in metadata:
        return [f"the tokenizer: {where} has none"]
    try:
        wrapped, ends = build_tokenizer(metadata, where)
    except AmalgamError as error:
        return [f"the tokenizer: {error.what}"]
    wrapped.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": getattr(wrapped, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in special.items() if token is not None},
    }
    if templates := _templates(metadata):
        alone = templates.get("default") if len(templates) == 1 else None
        config["chat_template"] = alone or [{"name": name, "template": text} for name, text in templates.items()]
    write_json(folder / "tokenizer_config.json", config)
    if not (folder / "generation_config.json").exists():
        ids = {f"{name}_token_id": getattr(wrapped, f"{name}_token_id") for name in ("bos", "pad")}
        known = {key: token_id for key, token_id in ids.items() if token_id is not None}
        write_json(folder / "generation_config.json", {**known, "eos_token_id": sorted(ends)})
    return []


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the one without is the default."""
    named = {
        key.removeprefix(f"{_TEMPLATE_KEY}."): text
        for key, text in metadata.items()
        if key.startswith(f"{_TEMPLATE_KEY}.") and isinstance(text, str)
    }
    default = metadata.get(_TEMPLATE_KEY)
    return {"default": default, **named} if isinstance(default, str) else named


def write_json(file: Path, value: Any) -> None:
    """JSON for people, as published checkpoints have it."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
