"""What each kernel of the Triton backend takes of a card: registers, shared memory and spills.

Compiled ahead of time for each kind of card. There need be none: nothing is run, and no time is measured.

    python benchmarks/gpu_kernels.py [--capability 90]… [--only "int4.* 1 rows"] [--json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from amalgam.kernels.backends import triton as room
from amalgam.kernels.backends.triton.resources import CARDS, SHARED_LIMIT, measure
from amalgam.kernels.backends.triton.variants import Variant


def all_variants() -> list[Variant]:
    """Those of every module of the room, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(room.__path__))
    modules = (importlib.import_module(f"{room.__name__}.{name}") for name in names)
    return [variant for module in modules for variant in getattr(module, "VARIANTS", ())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--capability", type=int, action="append", choices=sorted(CARDS), help="90 is 9.0; all if left out"
    )
    parser.add_argument("--only", default="", help="a regular expression: variants whose names it is found in")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    capabilities = arguments.capability or sorted(CARDS)
    variants = [variant for variant in all_variants() if re.search(arguments.only, variant.name)]
    found, failed = [], False
    for variant in variants:
        for capability in capabilities:
            try:
                of_it = asdict(measure(variant, capability))
            except Exception as error:
                of_it, failed = {"error": f"{type(error).__name__}: {error}"}, True
            found.append({"kernel": variant.name, "capability": capability, "warps": variant.num_warps, **of_it})
            print(f"{len(found)} of {len(variants) * len(capabilities)}", end="\r", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, capabilities)
    return int(failed)


def _print(found: list[dict[str, object]], capabilities: list[int]) -> None:
    print("Registers of a thread / KB of shared memory of a program / bytes spilled\n")
    table = Table(box=box.MARKDOWN)
    table.add_column("kernel")
    table.add_column("warps", justify="right")
    for capability in capabilities:
        limit = SHARED_LIMIT[capability] // 1024
        table.add_column(f"sm_{capability}, {CARDS[capability]} ({limit} KB)", justify="right")
    for name in dict.fromkeys(str(one["kernel"]) for one in found):
        rows = [one for one in found if one["kernel"] == name]
        table.add_row(name, str(rows[0]["warps"]), *map(_cell, rows))
    Console(width=240).print(table)


def _cell(one: dict[str, object]) -> str:
    if "error" in one:
        return "does not compile"
    return f"{one['registers']} / {int(str(one['shared'])) / 1024:.1f} / {one['spills']}"


if __name__ == "__main__":
    sys.exit(main())
