"""A tokenizer as it was read once, kept in a file: reading it again needs no transformers, whose import takes a second.

In: the folder of the packed cache, the files that a tokenizer is read from, and what reads it. Out: what encodes and
decodes exactly as the tokenizer read. Must never know: models' formats of tokenizers, tensors, requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any

_SUFFIX = ".tokenizer"
_MAX_BYTES = 256 * 2**20
_FIELDS = {"state", "backend", "vocab_size", "chat_template", "eos_token_id"}

logger = logging.getLogger("amalgam.text")


class KeptTokenizer:
    """Stands in for a tokenizer of transformers; the true one is read when a chat template is to be applied."""

    def __init__(self, kept: dict[str, Any], read: Callable[[], Any]) -> None:
        from tokenizers import Tokenizer as Backend

        self.backend_tokenizer = Backend.from_str(kept["backend"])
        self.num_ids = index(kept["vocab_size"])
        self.chat_template = kept["chat_template"]
        self.eos_token_id = kept["eos_token_id"]
        self._read = read
        self._lock = threading.Lock()

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        """As the tokenizer does it; the first call takes a second."""
        with self._lock:
            tokenizer = self._tokenizer
        return tokenizer.apply_chat_template(*arguments, **options)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._read()


def vocab_size(tokenizer: Any) -> int:
    """One more than the largest token id that a tokenizer can give; a kept one need not list its vocabulary."""
    if isinstance(tokenizer, KeptTokenizer):
        return tokenizer.num_ids
    return 1 + max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def read_through(cache_folder: Path, folder: Path, files: Sequence[Path], read: Callable[[], Any]) -> Any:
    """A folder's tokenizer from the cache, or else from `read`, whose result is then kept there.

    A file that is damaged or out of date is written again; a folder that cannot be written to is an empty one.

    Args:
        files: all that `read` reads, in `folder`.
        read: gives a tokenizer of transformers.
    """
    # By the folder alone, so that what has changed takes the place of what was there.
    path = cache_folder / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}{_SUFFIX}"
    try:
        state = _state(files)
        if path.stat().st_size <= _MAX_BYTES:
            kept = json.loads(path.read_bytes())
            if isinstance(kept, dict) and kept.keys() == _FIELDS and kept["state"] == state:
                return KeptTokenizer(kept, read)
    except OSError:
        pass
    except Exception as error:  # bare Exception is what tokenizers raises at JSON that is no tokenizer
        logger.warning("packed cache: %s is not usable: %s", path, error)
    tokenizer = read()
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        with contextlib.suppress(OSError):  # the weights' warning says it already
            kept = {
                "state": _state(files),
                "backend": tokenizer.backend_tokenizer.to_str(),
                "vocab_size": vocab_size(tokenizer),
                "chat_template": tokenizer.chat_template,
                "eos_token_id": tokenizer.eos_token_id,
            }
            _replace(path, json.dumps(kept).encode())
    return tokenizer


def _state(files: Sequence[Path]) -> list[Any]:
    """What the result depends on, equal after a passage through JSON: the libraries and the files as they are now."""
    found: list[Any] = [version("transformers"), version("tokenizers")]
    for file in files:
        status = file.stat()
        found.append([str(file), status.st_mtime_ns, status.st_size, status.st_ino])
    return found


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
