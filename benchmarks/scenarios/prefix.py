"""Time to the first token of prompts that begin alike, against prompts that do not."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from clients import Address, Answer, Request, check, complete
from contestants.protocol import text
from rich.console import Console
from scenarios.common import Document, make_table, spread
from servers import Server, awake, serving

from amalgam.tools.bench import SHAPES

PREFIX, SUFFIX = 2048, 64
OTHER_SEEDS = 10**6  # than those of rounds


def shared_prefix(options: argparse.Namespace, servers: dict[str, Server], console: Console) -> Document:
    results = []
    table = make_table(
        "server", "unshared s", "shared s", "ratio", "range", "predicted: tokens", "operations", "the rest alone"
    )
    max_tokens = PREFIX + SUFFIX + 1
    with serving(servers, options.folder, max_tokens=max_tokens, shares_prefixes=True) as running:
        for name, server in servers.items():
            with awake(running[name]):
                rounds = asyncio.run(_rounds(running[name].address, options.rounds))
            unshared, shared, alone = (
                [answer.first_token_seconds for answer in answers] for answers in zip(*rounds, strict=True)
            )
            ratios = [b / a for a, b in zip(unshared, shared, strict=True)]
            length = rounds[0][0].num_prompt_tokens or 0
            cached = median(answers[1].num_cached_tokens or 0 for answers in rounds)
            config = SHAPES["S"] if server.precision else json.loads(Path(server.model, "config.json").read_text())
            result = {
                "server": name,
                "unshared": unshared,
                "shared": shared,
                "alone": alone,
                "tokens": length,
                "cached": cached,
                "predicted_by_tokens": 1 - cached / length,
                "predicted_by_operations": operations(config, int(cached), length) / operations(config, 0, length),
                "rest_alone": median(c / a for a, c in zip(unshared, alone, strict=True)),
            }
            results.append(result)
            keys = ("predicted_by_tokens", "predicted_by_operations", "rest_alone")
            predicted = [f"{result[key]:.3f}" for key in keys]
            measured = (f"{median(unshared):.2f}", f"{median(shared):.2f}", f"{median(ratios):.3f}", spread(ratios, 3))
            table.add_row(name, *measured, *predicted)
    console.print(table)
    return {"prefix": PREFIX, "suffix": SUFFIX, "results": results}


async def _rounds(address: Address, rounds: int) -> list[tuple[Answer, Answer, Answer]]:
    """A prompt that shares nothing, one that shares its prefix, and one that is as long as the rest of that."""
    prefix = text(PREFIX, OTHER_SEEDS)
    check([await complete(address, Request(prefix + text(SUFFIX, OTHER_SEEDS + 1), 1))])
    found = []
    for round_ in range(rounds):
        unshared = await complete(address, Request(text(PREFIX + SUFFIX, 3 * round_), 1))
        shared = await complete(address, Request(prefix + text(SUFFIX, 3 * round_ + 1), 1))
        alone = await complete(address, Request(text(SUFFIX, 3 * round_ + 2), 1))
        check([unshared, shared, alone])
        found.append((unshared, shared, alone))
    return found


def operations(config: Mapping[str, Any], start: int, stop: int) -> float:
    """Multiplications and additions for a prompt's tokens from `start` to `stop`, and for the logits of the last one.

    Args:
        config: of a mixture of experts in each layer, as `config.json` has it.
    """
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    projections = 2 * hidden * head_dim * (heads + kv_heads)
    experts = config["num_experts_per_tok"] * 3 * hidden * config["moe_intermediate_size"]
    places = (start + 1 + stop) * (stop - start) / 2  # that the tokens look at: each at those before it and itself
    layer = 2 * (projections + experts) * (stop - start) + 4 * heads * head_dim * places
    return float(config["num_hidden_layers"] * layer + 2 * hidden * config["vocab_size"])
