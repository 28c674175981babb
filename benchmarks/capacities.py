"""Sources and devices for a model of Qwen3-235B's shape: how long choosing takes, and how near to the best it comes.

    python benchmarks/capacities.py
    python benchmarks/capacities.py --card 24 --processors 128 --slack 0.05

36,096 projections of 12,032 experts in eight formats on two devices; losses and the use of the experts are drawn, since
nobody has measured them here. Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
from rich.table import Table

from amalgam.cli.console import out
from amalgam.planning.placement import Place, place
from amalgam.tools.bench import commit, hardware

LAYERS, EXPERTS, CHOSEN, WEIGHTS = 94, 128, 8, 1536 * 4096
BITS = np.array([2.25, 2.5, 3.25, 4.125, 4.25, 4.5, 6.0, 8.25])
CARD_RATE, PROCESSOR_RATE = 1008e9, 80e9  # bytes a second: an RTX 4090, two channels of fast DDR5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=float, default=24.0, help="GB for experts (default: %(default)g)")
    parser.add_argument("--processors", type=float, default=128.0, help="GB (default: %(default)g)")
    parser.add_argument("--slack", type=float, nargs="+", default=[0.0, 0.01, 0.05])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    of_expert = np.minimum(generator.dirichlet(np.full(EXPERTS, 0.7), LAYERS) * CHOSEN, 1.0).ravel()
    use, groups = np.repeat(of_expert, 3), np.repeat(np.arange(LAYERS * EXPERTS), 3)
    shape = len(use), len(BITS)
    losses = use[:, None] * generator.lognormal(0, 1.5, (len(use), 1)) * 4.0**-BITS * generator.lognormal(0, 0.1, shape)
    memory = np.tile(BITS * WEIGHTS / 8, (len(use), 1))
    places = [
        Place("card", arguments.card * 1e9, memory, use[:, None] * memory / CARD_RATE),
        Place("processors", arguments.processors * 1e9, memory, use[:, None] * memory / PROCESSOR_RATE),
    ]
    table = Table("slack", "loss above its bound", "ms a step", "above its bound", "experts on the card", "use", "s")
    rows = []
    for slack in arguments.slack:
        started = time.perf_counter()
        found = place(losses, places, groups, slack=slack)
        seconds = time.perf_counter() - started
        here = found.places == 0
        row = {
            "slack": slack,
            "loss_above_bound": found.loss / found.loss_bound - 1,
            "step_ms": 1e3 * found.seconds,
            "seconds_gap": found.seconds_gap,
            "experts_on_card": float(here.mean()),
            "use_on_card": float(use[here].sum() / use.sum()),
            "solve_seconds": seconds,
        }
        rows.append(row)
        table.add_row(
            f"{slack:.0%}", f"{row['loss_above_bound']:.3%}", f"{row['step_ms']:.1f}", f"{row['seconds_gap']:.3%}",
            f"{row['experts_on_card']:.1%}", f"{row['use_on_card']:.1%}", f"{seconds:.1f}",
        )  # fmt: skip
    out.print(table)
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "rows": rows}))


if __name__ == "__main__":
    main()
