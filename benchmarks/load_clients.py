"""`amalgam bench serve` beside aiperf and guidellm: the same load on the same server, in turns.

    python benchmarks/load_clients.py --aiperf ENV/bin/aiperf --guidellm ENV/bin/guidellm             a simulated server
    python benchmarks/load_clients.py --aiperf … --url http://127.0.0.1:8080 --model demo --tokenizer models/demo
    python benchmarks/load_clients.py --saturation                       the search for it, beside what is known

Without `--url` a server whose times are known is asked (simulated.py): what a tool says can be held against them, and
differences between rounds are the tools' own. A real server should share no prefixes (`--engine.prefix_cache false`):
guidellm sends the same prompts in each round. Medians of a round's answers, and of the rounds; `to ours` is a tool's
figure by ours in the same round. A real server is not equally fast in all rounds; its own log of requests
(`--server.log_format json`, as `--server-log`) says what it took for those that a tool asked for. `to server` is the
tool's figure by that, and `both` that ratio by ours: what tools differ in, without what the server did meanwhile. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from engines import Child, exit_on_signals

from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
PORT = 8391
FIRST_MS, GAP_MS, SLOTS = 50.0, 10.0, 8  # of the simulated server


@dataclass(frozen=True)
class Load:
    """What is asked: by so many clients, each of which asks again when it has its answer; or at a constant rate.

    Attributes:
        rate: requests a second, however many are under way; None: by clients.
    """

    url: str
    model: str
    tokenizer: Path
    clients: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    rate: float | None = None


@dataclass(frozen=True)
class Figures:
    """Of one round, in requests a second and milliseconds; medians of its answers."""

    requests_per_second: float
    ttft: float
    tpot: float
    e2e: float


def ours(_: str, load: Load, folder: Path) -> Figures:
    form = f"--rate {load.rate} --arrivals constant" if load.rate else f"--concurrency {load.clients}"
    [point] = bench_serve(
        load.url,
        *f"--model {load.model} --tokenizer {load.tokenizer} {form}".split(),
        *f"--requests {load.requests} --warmup {load.clients}".split(),
        *f"--prompt-tokens {load.prompt_tokens} --output-tokens {load.output_tokens}".split(),
    )["points"]
    latency = point["latency_ms"]
    return Figures(
        point["throughput"]["requests_per_second"], *(latency[name]["p50"] for name in ("ttft", "tpot", "e2e"))
    )


def aiperf(program: str, load: Load, folder: Path) -> Figures:
    form = f"--request-rate {load.rate} --request-rate-mode constant" if load.rate else f"--concurrency {load.clients}"
    run(
        program, "profile", "--url", load.url, "--model", load.model, "--tokenizer", str(load.tokenizer),
        *["--endpoint-type", "completions", "--streaming", "--ui", "none", "--extra-inputs", "ignore_eos:true"],
        *f"{form} --request-count {load.requests}".split(),
        *f"--warmup-request-count {load.clients} --isl {load.prompt_tokens} --osl {load.output_tokens}".split(),
        *f"--random-seed {time.time_ns() % 10**6} --artifact-dir {folder}".split(),
    )  # fmt: skip
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    names = ("time_to_first_token", "inter_token_latency", "request_latency")
    # Its own rate is of a window that begins before the first request.
    lines = (folder / "profile_export.jsonl").read_text().splitlines()
    sent = [json.loads(line)["metadata"] for line in lines]
    requests = [one for one in sent if one["benchmark_phase"] == "profiling"]
    span = max(one["request_end_ns"] for one in requests) - min(one["request_start_ns"] for one in requests)
    return Figures(len(requests) / span * 1e9, *(found[name]["p50"] for name in names))


def guidellm(program: str, load: Load, folder: Path) -> Figures:
    run(
        program, "run", "--disable-console",
        "--backend", f"kind=openai_http,target={load.url},model={load.model},request_format=/v1/completions",
        "--profile", f"kind=constant,rate={load.rate}" if load.rate else f"kind=concurrent,streams={load.clients}",
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}",
        "--tokenizer", f"kind=huggingface_auto,model={load.tokenizer}",
        "--output", f"kind=json,path={folder / 'guidellm.json'}",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    [benchmark] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    median = {
        name: figures["successful"]["median"] for name, figures in benchmark["metrics"].items() if name in GUIDELLM
    }
    # Its own rate is of a window that leaves out the ends.
    requests = benchmark["requests"]["successful"]
    span = max(one["request_end_time"] for one in requests) - min(one["request_start_time"] for one in requests)
    return Figures(len(requests) / span, *(median[name] * factor for name, factor in GUIDELLM.items()))


GUIDELLM = {"time_to_first_token_ms": 1.0, "inter_token_latency_ms": 1.0, "request_latency": 1e3}
TOOLS: dict[str, Callable[[str, Load, Path], Figures]] = {"ours": ours, "aiperf": aiperf, "guidellm": guidellm}


def bench_serve(url: str, *options: str) -> dict[str, Any]:
    """What `amalgam bench serve --json` prints."""
    command = [sys.executable, "-m", "amalgam.cli", "bench", "serve", "--url", url, "--json", *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def run(*command: str, **variables: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if result.returncode:
        raise SystemExit(f"{command[0]} ended with {result.returncode}:\n{(result.stdout + result.stderr)[-2000:]}")


@contextmanager
def simulated() -> Iterator[str]:
    """A server with known times; its address."""
    script = [sys.executable, str(ROOT / "benchmarks" / "simulated.py"), "--port", str(PORT)]
    script += f"--first-ms {FIRST_MS} --gap-ms {GAP_MS} --slots {SLOTS}".split()
    url = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryDirectory() as folder:
        server = Child(script, Path(folder) / "log")
        try:
            server.wait_until(lambda: urlopen(f"{url}/health").status == 200)
            yield url
        finally:
            server.close()


@dataclass(frozen=True)
class Round:
    """What a tool found, and what the server's log says of the same requests."""

    found: Figures
    server: Figures | None = None


def server_figures(log: Path, load: Load) -> Figures:
    """Of the latest requests of the load, from a server's log in JSON: those before them warmed it up."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    answers = [line for line in lines if line.get("generated_tokens") == load.output_tokens][-load.requests :]
    if len(answers) < load.requests:
        raise SystemExit(
            f"{log} has {len(answers)} of {load.requests} requests: start the server with --server.log_format json."
        )
    ends = [datetime.fromisoformat(one["time"]).timestamp() for one in answers]
    first, whole = ([one[name] for one in answers] for name in ("first_token_seconds", "seconds"))
    span = max(ends) - min(end - seconds for end, seconds in zip(ends, whole, strict=True))
    tpot = [(b - a) / (load.output_tokens - 1) for a, b in zip(first, whole, strict=True)]
    return Figures(len(answers) / span, *(statistics.median(values) * 1e3 for values in (first, tpot, whole)))


def compare(programs: dict[str, str], load: Load, rounds: int, log: Path | None) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = {name: [] for name in programs}
    for index in range(rounds):
        order = list(programs)
        for name in order[index % len(order) :] + order[: index % len(order)]:
            with tempfile.TemporaryDirectory() as folder:
                figures = TOOLS[name](programs[name], load, Path(folder))
            found[name].append(Round(figures, None if log is None else server_figures(log, load)))
            print(f"round {index + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def print_comparison(found: dict[str, list[Round]]) -> None:
    has_log = found["ours"][0].server is not None
    print(f"{'':10}{'':22}{'median':>9}{'range':>18}{'to ours':>9}" + f"{'to server':>11}{'both':>8}" * has_log)
    for name, rounds in found.items():
        for field in Figures.__dataclass_fields__:
            values = [getattr(one.found, field) for one in rounds]
            own = [getattr(one.found, field) for one in found["ours"]]
            spread = f"{min(values):.4g} to {max(values):.4g}"
            line = f"{name:10}{field:22}{statistics.median(values):9.4g}{spread:>18}{_ratio(values, own):9.3f}"
            if has_log:
                told = [getattr(one.server, field) for one in rounds]
                own_told = [getattr(one.server, field) for one in found["ours"]]
                both = [a / b / (c / d) for a, b, c, d in zip(values, told, own, own_told, strict=True)]
                line += f"{_ratio(values, told):11.3f}{statistics.median(both):8.3f}"
            print(line)


def _ratio(values: Sequence[float], to: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(values, to, strict=True))


def find_saturation(url: str, load: Load, rounds: int) -> list[float]:
    """Requests a second, as found by each of some searches."""
    found = []
    for _ in range(rounds):
        document = bench_serve(
            url,
            "--find-saturation",
            *f"--model {load.model} --tokenizer {load.tokenizer} --max-concurrency 64".split(),
            *f"--prompt-tokens {load.prompt_tokens} --output-tokens {load.output_tokens}".split(),
        )
        found.append(document["saturation"]["requests_per_second"])
        print(f"saturation: {found[-1]:.4g} requests/s", file=sys.stderr, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="default: a simulated server")
    parser.add_argument("--model", default="simulated")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "demo", metavar="FOLDER")
    parser.add_argument("--server-log", type=Path, metavar="FILE", help="of the server at --url, in JSON")
    parser.add_argument("--aiperf", metavar="PROGRAM")
    parser.add_argument("--guidellm", metavar="PROGRAM")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rate", type=float, help="requests a second, evenly spaced, in place of clients")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--saturation", action="store_true", help="search it instead, beside what the simulated one bears"
    )
    options = parser.parse_args(arguments)
    if options.server_log is not None and options.url is None:
        parser.error("--server-log is of the server at --url")
    exit_on_signals()
    programs = {"ours": ""} | {
        name: getattr(options, name) for name in ("aiperf", "guidellm") if getattr(options, name)
    }
    document: dict[str, Any] = {"command": sys.argv, "commit": commit(), "hardware": hardware()}
    with simulated() if options.url is None else nullcontext(options.url) as url:
        sizes = options.clients, options.requests, options.prompt_tokens, options.output_tokens
        load = Load(url, options.model, options.tokenizer.resolve(), *sizes, rate=options.rate)
        if options.saturation:
            rates = find_saturation(url, load, options.rounds)
            known = SLOTS / (FIRST_MS + (load.output_tokens - 1) * GAP_MS) * 1e3 if options.url is None else None
            print(
                f"found {', '.join(f'{rate:.4g}' for rate in rates)} requests/s"
                + (f", known {known:.4g}" if known else "")
            )
            document |= {"found": rates, "known": known}
        else:
            found = compare(programs, load, options.rounds, options.server_log)
            print_comparison(found)
            document |= {"rounds": {name: [asdict(one) for one in figures] for name, figures in found.items()}}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
