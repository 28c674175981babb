"""What scenarios share: tables, percentiles, waiting for a server.

In: a running server, figures. Out: a table, once the server does nothing any more. Must never know what is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from clients import percentile
from rich.table import Table
from servers import Running

MIB = 2**20
_TEXTS = ("server", "against")  # columns that hold no figures

Document = dict[str, Any]


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p50": percentile(seconds, 0.5), f"{name}_p99": percentile(seconds, 0.99)}


def make_table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXTS else "right")
    return table


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


async def until_idle(server: Running) -> None:
    await until(lambda: not any(server.gauges()[f"amalgam_requests_{state}"] for state in ("running", "waiting")))
    await asyncio.sleep(1)  # connections that have ended are let go


async def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for what must come.

    Raises:
        TimeoutError: it has not.
    """
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.1)
