"""Our server against llama.cpp's and vLLM's, over OpenAI's `/v1/completions`, and what load does to it; shape S.

    python benchmarks/serving.py FOLDER                        throughput and latency, side by side; 20 minutes
    python benchmarks/serving.py FOLDER --scenario long        tokens' gaps while prompts of up to 4,000 arrive, and
                                                               whether answers are those of single runs
    python benchmarks/serving.py FOLDER --scenario prefix      time to the first token with and without a shared prefix
    python benchmarks/serving.py FOLDER --scenario overload    twice what it can serve, for --minutes
    python benchmarks/serving.py FOLDER --scenario cancel      1,000 requests whose clients leave
    python benchmarks/serving.py FOLDER --scenario grammars    16 streams with and without a JSON schema

FOLDER keeps environments and models (20 GB), which the first run makes; `--prepare` only makes them. To try a scenario,
`--servers "amalgam demo"` needs nothing of that and takes a minute or two. Every server is a process of its own with
two threads and is stopped (SIGSTOP) while another is asked; those of one precision take turns by number of clients and
round, and a ratio is the median of the rounds' ratios. Clients send the next request when the last one has ended;
prompts are of mixed lengths and have nothing in common unless a scenario says so. Prints tables and, as the last line,
one JSON object (`--json`: only that); the exit code is 1 if an answer differs that must not. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engines import exit_on_signals
from environments import prepare
from llama_builds import labelled
from rich.console import Console
from scenarios.cancel import cancel
from scenarios.grammars import grammars
from scenarios.long_prompts import long_prompts
from scenarios.overload import overload
from scenarios.prefix import shared_prefix
from scenarios.throughput import throughput
from servers import SERVERS

from amalgam.tools.bench import commit, hardware

CLIENTS = (1, 4, 8, 16)
PROMPTS = (16, 32, 64, 128)
ROUNDS = {"throughput": 5, "prefix": 5, "grammars": 7}  # of the others one

SCENARIOS = {
    "throughput": throughput,
    "long": long_prompts,
    "prefix": shared_prefix,
    "overload": overload,
    "cancel": cancel,
    "grammars": grammars,
}
OURS_ONLY = {"overload", "cancel", "grammars"}  # they read our metrics, or send what only ours understands


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps environments and models")
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="throughput")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), help="default: by scenario")
    parser.add_argument("--clients", nargs="+", type=int, default=CLIENTS)
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS, help="their lengths")
    parser.add_argument("--tokens", type=int, default=32, help="new ones for each prompt")
    parser.add_argument("--least", type=int, default=4, help="requests of a round, where there are fewer clients")
    parser.add_argument("--rounds", type=int, help="default: by scenario")
    parser.add_argument("--minutes", type=float, help="of overload (10); no round of throughput ends later (16)")
    parser.add_argument("--requests", type=int, default=1000, help="that are cancelled")
    parser.add_argument("--slowdowns", nargs="+", type=float, default=[2.0], help="engine.max_slowdown of `long`")
    parser.add_argument("--checked", type=int, default=100, help="requests of streams that `long` repeats alone")
    parser.add_argument("--prepare", action="store_true", help="only make environments and models")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    exit_on_signals()
    options.folder = options.folder.resolve()
    options.rounds = options.rounds or ROUNDS.get(options.scenario, 1)
    options.minutes = options.minutes or (16.0 if options.scenario == "throughput" else 10.0)
    compared = [name for name, server in SERVERS.items() if server.precision]
    names = options.servers or (compared if options.scenario == "throughput" else compared[:1])
    servers = {name: SERVERS[name] for name in names}
    if options.scenario in OURS_ONLY and not all(server.is_ours for server in servers.values()):
        parser.error(f"--scenario {options.scenario} is for our own servers")
    environments = {server.environment for server in servers.values()} - {""}
    prepare(options.folder, environments, {server.model for server in servers.values() if server.precision})
    if options.prepare:
        return 0
    servers = {labelled(name, options.folder, server.environment): server for name, server in servers.items()}
    console = Console(quiet=options.json, width=None if sys.stdout.isatty() else 120)
    result = SCENARIOS[options.scenario](options, servers, console)
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "scenario": options.scenario, **result}
    print(json.dumps(document))
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
