"""What the C library keeps of freed memory (glibc; elsewhere nothing happens).

Weights come and go while a server runs, in pieces of some kilobytes to some megabytes and in threads that are there for
one change. By default glibc gives up to eight heaps per core to the threads of a process. Each keeps holes of its own:
80 changes of a model of 25 MB left 9 MB in them, and 3 MB in a single one (docs/log/changing-precision.md).
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # of malloc.h


def share_one_heap() -> None:
    """Have all threads take memory from one heap. To be called before threads are begun, and by programs only."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1))


def return_free_memory() -> None:
    """Give memory that this process has freed back to the system."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))
