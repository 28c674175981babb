"""Links of documents to files of the repository, which the site does not have.

In: a document, where it lies. Out: the same with these files named in place of links.
"""

from __future__ import annotations

import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)\)")


def without_links_out(markdown: str, document: Path, docs: Path) -> str:
    """Name what lies outside of `docs` instead of linking to it.

    Args:
        document: the file, below `docs`.
    """
    root = docs.parent

    def named(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (document.parent / target).resolve()
        if ":" in target or not path.exists() or path.is_relative_to(docs) or not path.is_relative_to(root):
            return match[0]
        name = path.relative_to(root).as_posix()
        return text if name in text else f"{text} (`{name}`)"

    return LINK.sub(named, markdown)
