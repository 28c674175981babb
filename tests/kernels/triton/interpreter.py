"""Triton's interpreter, without what takes nine parts in ten of its time.

It puts its own functions into `triton.language` anew for each launch, and for each call of a function inside a kernel,
`tl.cdiv` and `tl.max` included. Once for the process is enough where nothing is compiled in it.
"""

from __future__ import annotations

from types import FunctionType, SimpleNamespace


def patch_once() -> None:
    """To be called once, before the first launch."""
    from triton import language
    from triton.runtime import interpreter

    interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": language, "core": language.core}))
    kept = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: kept
