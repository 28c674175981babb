"""What saved sets may be called.

In: a name that a client gave. Out: the same without the ending, checked. Must never know: files; nor import torch, as
the server's port opens before that.
"""

from __future__ import annotations

import re

from amalgam.errors import RequestError, describe

NPZ = ".npz"
SUFFIX = ".safetensors"
SUFFIXES = (SUFFIX, NPZ)  # the first one found is read
MAX_NAME_CHARS = 200
MAX_FILE_NAME_CHARS = MAX_NAME_CHARS + max(map(len, SUFFIXES))
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """A saved set's name, which is its file's name without its ending; the file's name is taken too.

    Raises:
        RequestError: not a plain name.
    """
    if isinstance(name, str):
        ending = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        if is_name(short := name.removesuffix(ending)):
            return short
    raise RequestError(
        f"name is {describe(name)}.",
        remedy=f"Use a letter or digit, then letters, digits, . _ and -; at most {MAX_NAME_CHARS}, and not "
        f"{' or '.join(SUFFIXES)} twice.",
    )


def is_name(text: str) -> bool:
    """Whether a set is kept under it. One that ends as files do would name two: its own, and the one without the second
    ending.
    """
    return len(text) <= MAX_NAME_CHARS and not text.endswith(SUFFIXES) and SAFE_NAME.fullmatch(text) is not None
