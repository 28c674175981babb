"""Texts that a user names: a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from amalgam.errors import RequestError

STDIN = Path("-")


def read_text(file: Path) -> str:
    """
    Raises:
        RequestError: it cannot be read, is no UTF-8, or has no words.
    """
    where = "stdin" if file == STDIN else repr(str(file))
    try:
        text = (sys.stdin.buffer.read() if file == STDIN else file.expanduser().read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{where} cannot be read ({error.strerror}).", remedy="Give a text file.") from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8 (byte {error.start + 1}).", remedy="Convert it, for instance with iconv."
        ) from None
    if not text.strip():
        raise RequestError(f"{where} is empty.", remedy="Give a text with words.")
    return text
