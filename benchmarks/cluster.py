"""Several replicas on Ray beside servers alone: is nothing lost, what does it cost?

    python benchmarks/cluster.py [--config config/model_config.yaml] [--shows load kill …]

Replicas and servers have one thread each. What is shown:

    load     tokens/s of one server alone and of one replica, of two servers side by side and of two replicas, in
             turns, with streams and without; how evenly requests were spread; milliseconds that a request for one token
             takes through the cluster and without it, and of these the router's
    prefix   requests with common beginnings, and how many of their tokens were found in a cache
    kill     `kill -9` of a replica that streams: which answers came whole, which were cut and say so, which were lost;
             seconds until there are as many replicas as before
    rollback re-maps, and one in which a replica is killed while it builds: the weights of all afterwards
    scale    replicas over time while the load comes and goes
    soak     minutes of load with a re-map each, and what was lost

Prints tables and, as the last line, one JSON object. The exit code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from engines import exit_on_signals
from remapping.live import LiveServer, Question, StreamedAnswer
from rich.console import Console
from rich.table import Table

from amalgam.tools.bench import commit, hardware
from amalgam.tools.load.http import Address, Connections, ExchangeError

SHOWS = ("load", "prefix", "kill", "rollback", "scale", "soak")
ONE = "model.layers.3.mlp.experts.9.up_proj.weight"
ALL = "model.layers.*.mlp.experts.*"
STOP_SECONDS = 60
NUM_LATENCIES = 60
STREAM_SECONDS = 30  # how long to wait for a moment at which the replica to be killed streams


class Cluster(LiveServer):
    """`amalgam deploy ray`, ready."""

    def __init__(self, config: Path, log: Path, flags: Sequence[str] = ()) -> None:
        super().__init__(
            config, log, ("--engine.num_threads", "1", "--server.log_probes", "false", *flags), ("deploy", "ray")
        )
        wanted = int(flags[flags.index("--replicas") + 1]) if "--replicas" in flags else 1
        self.wait_until(lambda: self.num_ready >= wanted)

    def stop(self) -> float:
        """Seconds that its end takes."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with suppress(Exception):
            self.process.wait(STOP_SECONDS)
        self.close()
        return time.monotonic() - began

    def samples(self) -> dict[str, float]:
        """All metrics, each with its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    @property
    def num_ready(self) -> int:
        return int(self.samples().get('amalgam_cluster_replicas{state="ready"}', 0))

    @property
    def pids(self) -> dict[str, int]:
        """Replica → its process."""
        found = {}
        for name in self.samples():
            if name.startswith("amalgam_cluster_replica_info{"):
                labels = dict(part.split("=", 1) for part in name.partition("{")[2].rstrip("}").split(","))
                found[labels["replica"].strip('"')] = int(labels["pid"].strip('"'))
        return found

    @property
    def resident_bytes(self) -> int:
        """Of the gateway and all replicas, without pages of files."""
        samples = self.samples().items()
        return int(sum(v for k, v in samples if k.startswith("amalgam_memory_bytes{") and 'kind="anonymous"' in k))

    def by_replica(self, name: str) -> dict[str, float]:
        prefix = f'amalgam_cluster_{name}{{replica="'
        return {key[len(prefix) : -2]: value for key, value in self.samples().items() if key.startswith(prefix)}


class Alone(LiveServer):
    """`amalgam serve`, with one thread."""

    def __init__(self, config: Path, log: Path) -> None:
        super().__init__(config, log, ("--engine.num_threads", "1", "--server.log_probes", "false"))

    def stop(self) -> float:
        self.close()
        return 0.0


@dataclass
class Tally:
    """What became of requests."""

    whole: int = 0
    cut: int = 0  # streams that had begun, and say that their replica was lost
    resent_late: int = 0
    lost: list[str] = field(default_factory=list)
    num_tokens: int = 0
    versions: Counter[int] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)  # seconds to the first token
    open: list[StreamedAnswer] = field(default_factory=list)  # streams under way

    @property
    def num_streaming(self) -> int:
        """Streams under way of which a token has come."""
        return sum(bool(answer.arrivals) for answer in self.open)

    def as_row(self) -> dict[str, Any]:
        return {
            "answers whole": self.whole,
            "cut, and say so": self.cut,
            "lost": len(self.lost),
            "first token p50 ms": median(self.firsts) * 1e3 if self.firsts else 0.0,
            "first token max ms": max(self.firsts, default=0.0) * 1e3,
            "versions": " ".join(f"{version}:{count}" for version, count in sorted(self.versions.items())),
            **({"first lost": self.lost[0][:120]} if self.lost else {}),
        }


class Whole:
    """An answer that does not stream, as it comes."""

    def __init__(self) -> None:
        self.status, self.body = 0, b""

    def head(self, status: int, headers: Any) -> bool:
        self.status = status
        return False

    def piece(self, data: bytes, now: float) -> bool:
        self.body += data
        return False


async def one(port: int, question: Question, tally: Tally, *, streams: bool) -> None:
    """Ask once, and note what became of it."""
    connections = Connections(Address("http", "127.0.0.1", port), keeps=False)
    body = json.dumps({**question.body, **({"stream": True} if streams else {})}).encode()
    reader: Any = StreamedAnswer(question) if streams else Whole()
    sent = time.perf_counter()
    if streams:
        tally.open.append(reader)
    try:
        await connections.exchange("POST", "/generate", [("Content-Type", "application/json")], body, reader)
    except (ExchangeError, OSError) as error:
        tally.lost.append(f"{type(error).__name__}: {error}")
        return
    finally:
        if streams:
            tally.open = [other for other in tally.open if other is not reader]
    if streams and not reader.error and reader.version is not None:
        tally.firsts.append(reader.arrivals[0] - sent if reader.arrivals else 0.0)
        version, tokens = reader.version, reader.num_tokens
    elif streams and "replica_lost" in reader.error and reader.arrivals:
        tally.cut += 1
        return
    elif not streams and reader.status == 200:
        fields = json.loads(reader.body)
        version, tokens = fields["weight_version"], fields["generated_tokens"]
    else:
        told = reader.error if streams else f"{reader.status} {reader.body.decode(errors='replace')}"
        tally.lost.append(f"{'stream' if streams else 'answer'}: {told or 'ended early'}")
        return
    tally.whole += 1
    tally.num_tokens += tokens
    tally.versions[version] += 1


async def load(
    port: int,
    num_clients: int,
    until: Callable[[], bool],
    *,
    num_tokens: int,
    share: float = 0.5,
    seed: int = 0,
    into: Tally | None = None,
) -> tuple[Tally, float]:
    """Clients that ask anew as soon as they have their answers; `share` of the requests stream."""
    tally, rng, began = into or Tally(), random.Random(seed), time.perf_counter()

    async def client(number: int) -> None:
        while not until():
            text = " ".join(str(rng.randrange(1000)) for _ in range(12))
            question = Question(f"{text} ", num_tokens, rng.randrange(2**31))
            await one(port, question, tally, streams=rng.random() < share)

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    return tally, time.perf_counter() - began


def after(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


class Bench:
    """Where the parts of it are, and how long they measure."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.config, self.folder = arguments.config, folder
        self.seconds, self.num_clients, self.num_tokens = arguments.seconds, arguments.clients, arguments.tokens
        self.minutes, self.replicas, self.rounds = arguments.minutes, arguments.replicas, arguments.rounds
        self.number = 0

    def log(self, name: str) -> Path:
        self.number += 1
        return self.folder / f"{self.number}-{name}.log"

    @contextmanager
    def cluster(self, *flags: str) -> Iterator[Cluster]:
        made = Cluster(self.config, self.log("cluster"), flags)
        try:
            yield made
        finally:
            made.stop()

    @contextmanager
    def alone(self) -> Iterator[Alone]:
        made = Alone(self.config, self.log("alone"))
        try:
            yield made
        finally:
            made.stop()

    def throughput(self, ports: Sequence[int], num_clients: int, share: float) -> tuple[float, Tally]:
        """Tokens/s of all together, `num_clients` of which ask at each port; `share` of the answers stream."""

        async def run() -> list[tuple[Tally, float]]:
            until = after(self.seconds)
            loads = (
                load(port, num_clients, until, num_tokens=self.num_tokens, share=share, seed=port) for port in ports
            )
            return list(await asyncio.gather(*loads))

        found = asyncio.run(run())
        total = Tally()
        for tally, _ in found:
            total.lost += tally.lost
            total.whole += tally.whole
        return sum(tally.num_tokens / seconds for tally, seconds in found), total


def latency(port: int) -> float:
    """Milliseconds of a request for one token, one after the other, over one connection each; median."""

    async def run() -> float:
        tally, times = Tally(), []
        for number in range(NUM_LATENCIES):
            began = time.perf_counter()
            await one(port, Question(f"{number} ", 1, number), tally, streams=False)
            times.append((time.perf_counter() - began) * 1e3)
        assert not tally.lost, tally.lost[0]
        return median(times)

    return asyncio.run(run())


def show_load(bench: Bench) -> list[dict[str, Any]]:
    """One replica beside a server, then two beside two. All are there, and are asked in turns."""
    rows = []
    for count in (1, 2):
        with ExitStack() as running:
            ports = [running.enter_context(bench.alone()).port for _ in range(count)]
            cluster = running.enter_context(bench.cluster("--replicas", str(count)))
            rows.append(beside(bench, ports, cluster))
    return rows


def beside(bench: Bench, ports: Sequence[int], cluster: Cluster) -> dict[str, Any]:
    """A cluster and as many servers as it has replicas, with as many clients for each of them."""
    count, lost = len(ports), 0
    latency(cluster.port)  # warm
    before = cluster.counters()
    through_ms, alone_ms = latency(cluster.port), latency(ports[0])
    after_ = cluster.counters()
    router = [after_[name] - before[name] for name in
              ("amalgam_cluster_route_seconds_sum", "amalgam_cluster_route_seconds_count")]  # fmt: skip
    routed_before = Counter(cluster.by_replica("requests_routed_total"))
    row: dict[str, Any] = {"replicas": count}
    for what, share in (("streams", 1.0), ("whole", 0.0)):
        alone, through = [], []
        for round_ in range(bench.rounds + 1):  # the first one warms
            for name in ("alone", "through")[:: 1 if round_ % 2 else -1]:
                asked, num_clients = (ports, bench.num_clients) if name == "alone" else (
                    [cluster.port], bench.num_clients * count
                )  # fmt: skip
                speed, tally = bench.throughput(asked, num_clients, share)
                lost += len(tally.lost)
                if round_:
                    (alone if name == "alone" else through).append(speed)
        ratios = [mine / other for mine, other in zip(through, alone, strict=True)]
        row |= {
            f"servers alone, {what} tok/s": median(alone),
            f"replicas, {what} tok/s": median(through),
            f"{what}, ratio": median(ratios),
            f"{what}, least": min(ratios),
            f"{what}, most": max(ratios),
        }
    routed = (Counter(cluster.by_replica("requests_routed_total")) - routed_before).values()
    return row | {
        "one token alone ms": alone_ms,
        "one token through ms": through_ms,
        "of these router ms": router[0] / max(router[1], 1) * 1e3,
        "busiest against even": max(routed) * count / sum(routed),
        "lost": lost,
    }


def show_prefix(bench: Bench) -> list[dict[str, Any]]:
    """Eight beginnings, each of many requests, one after the other."""
    beginnings = [" ".join(f"{letter}{number}" for number in range(120)) for letter in "abcdefgh"]
    with bench.cluster("--replicas", "2") as cluster:

        async def run() -> Tally:
            tally, rng = Tally(), random.Random(0)
            for number in range(64):
                prompt = f"{rng.choice(beginnings)} {number}"
                await one(cluster.port, Question(prompt, 2, number), tally, streams=False)
            return tally

        tally = asyncio.run(run())
        counters, samples = cluster.counters(), cluster.samples()
    hits, asked = counters["amalgam_prefix_hit_tokens_total"], counters["amalgam_prefix_query_tokens_total"]
    reasons = {
        name: samples[f'amalgam_cluster_routing_total{{reason="{name}"}}'] for name in ("prefix", "load", "overflow")
    }
    return [{"requests": tally.whole, "tokens found": hits / asked, **reasons, "lost": len(tally.lost)}]


async def streaming_replica(cluster: Cluster, tally: Tally) -> str:
    """A replica, at a moment at which it streams: more streams are under way than the others have requests."""
    deadline = time.monotonic() + STREAM_SECONDS
    while time.monotonic() < deadline:
        in_flight = await asyncio.to_thread(cluster.by_replica, "in_flight")
        chosen = max(in_flight, key=lambda replica_id: in_flight[replica_id])
        if tally.num_streaming > sum(in_flight.values()) - in_flight[chosen]:
            return chosen
        await asyncio.sleep(0.05)
    raise RuntimeError("No replica has streamed.")


def show_kill(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for num_replicas in bench.replicas:
        with bench.cluster("--replicas", str(num_replicas)) as cluster:
            rows.append({"replicas": num_replicas, **asyncio.run(killed(bench, cluster, num_replicas))})
    return rows


async def killed(bench: Bench, cluster: Cluster, num_replicas: int) -> dict[str, Any]:
    tally, is_back, found = Tally(), asyncio.Event(), dict[str, Any]()

    async def kill() -> None:
        pids = await asyncio.to_thread(lambda: cluster.pids)
        await asyncio.sleep(bench.seconds / 2)
        pid = pids[await streaming_replica(cluster, tally)]
        found["streams at the kill"] = tally.num_streaming
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while pid in (await asyncio.to_thread(lambda: cluster.pids)).values() or (  # noqa: ASYNC110 – another process
            await asyncio.to_thread(lambda: cluster.num_ready) < num_replicas
        ):
            await asyncio.sleep(0.2)
        found["replaced after s"] = time.monotonic() - began
        await asyncio.sleep(2.0)
        is_back.set()

    asking = load(
        cluster.port, bench.num_clients, is_back.is_set, num_tokens=4 * bench.num_tokens, share=0.75, into=tally
    )
    await asyncio.gather(asking, kill())
    counters = await asyncio.to_thread(cluster.counters)
    return {
        **tally.as_row(),
        "cut, by the gateway's count": counters["amalgam_cluster_streams_cut_total"],
        "sent to another": counters["amalgam_cluster_requests_resent_total"],
        **found,
    }


def weight_versions(cluster: Cluster) -> list[int]:
    return sorted({int(value) for value in cluster.by_replica("weight_version").values()})


def show_rollback(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    with bench.cluster("--replicas", "2") as cluster:

        async def remapped(what: str, mapping: dict[str, str], *, kills: bool) -> dict[str, Any]:
            done = asyncio.Event()

            async def change() -> str:
                await asyncio.sleep(1.0)
                pids = await asyncio.to_thread(lambda: cluster.pids)
                asked = asyncio.create_task(cluster.remap(mapping))
                if kills:
                    await asyncio.sleep(0.05)
                    os.kill(next(iter(pids.values())), signal.SIGKILL)
                try:
                    answer = await asked
                    told = f"version {answer['weight_version']}, {answer['seconds']:.2f} s"
                except urllib.error.HTTPError as error:
                    told = f"{error.code} {json.loads(error.read())['error']['type']}"
                while await asyncio.to_thread(lambda: cluster.num_ready) < 2:  # noqa: ASYNC110 – another process
                    await asyncio.sleep(0.2)
                await asyncio.sleep(2.0)
                done.set()
                return told

            (tally, _), told = await asyncio.gather(
                load(cluster.port, bench.num_clients, done.is_set, num_tokens=bench.num_tokens), change()
            )
            return {"re-map": what, "answer": told, "versions in replicas": weight_versions(cluster), **tally.as_row()}

        rows.append(asyncio.run(remapped("one expert", {ONE: "fp8"}, kills=False)))
        rows.append(asyncio.run(remapped("all experts, a replica killed", {ALL: "fp8"}, kills=True)))
        rows.append(asyncio.run(remapped("a source that is none", {ALL: "none"}, kills=False)))
        rows.append(asyncio.run(remapped("all experts", {ALL: "fp8"}, kills=False)))
    return rows


def show_scale(bench: Bench) -> list[dict[str, Any]]:
    flags = ("--min-replicas", "1", "--max-replicas", "3", "--cluster.replicas", "1", "--cluster.target_requests", "4",
             "--cluster.upscale_seconds", "2", "--cluster.downscale_seconds", "5")  # fmt: skip
    with bench.cluster(*flags) as cluster:
        began, seen = time.monotonic(), [(0.0, 1)]

        async def watch(until: Callable[[], bool]) -> None:
            while not until():
                ready = await asyncio.to_thread(lambda: cluster.num_ready)
                if ready != seen[-1][1]:
                    seen.append((time.monotonic() - began, ready))
                await asyncio.sleep(0.2)

        async def run() -> Tally:
            limit = after(90)
            up = lambda: seen[-1][1] == 3 or limit()  # noqa: E731
            (tally, _), _ = await asyncio.gather(load(cluster.port, 12, up, num_tokens=bench.num_tokens), watch(up))
            limit_down = after(90)
            down = lambda: seen[-1][1] == 1 or limit_down()  # noqa: E731
            (few, _), _ = await asyncio.gather(load(cluster.port, 1, down, num_tokens=8), watch(down))
            tally.lost += few.lost
            tally.whole += few.whole
            tally.cut += few.cut
            return tally

        tally = asyncio.run(run())
    told = ", ".join(f"{count} at {seconds:.0f} s" for seconds, count in seen)
    return [
        {"replicas": told, "scaled up": max(count for _, count in seen), "and down to": seen[-1][1], **tally.as_row()}
    ]


def show_soak(bench: Bench) -> list[dict[str, Any]]:
    sources = ("fp8", "base", "int4")
    with bench.cluster("--replicas", "2") as cluster:

        async def run() -> tuple[Tally, float, list[float], int]:
            until, took, failed = after(60 * bench.minutes), [], 0

            async def change() -> None:
                nonlocal failed
                number = 0
                while not until():
                    await asyncio.sleep(min(60.0, 60 * bench.minutes / 3))
                    if until():
                        return
                    try:
                        answer = await cluster.remap({ALL if number % 2 else ONE: sources[number % len(sources)]})
                        took.append(answer["seconds"])
                    except urllib.error.HTTPError:
                        failed += 1
                    number += 1

            (tally, seconds), _ = await asyncio.gather(
                load(cluster.port, bench.num_clients, until, num_tokens=bench.num_tokens), change()
            )
            return tally, seconds, took, failed

        tally, seconds, took, failed = asyncio.run(run())
        resident = cluster.resident_bytes
        ended = cluster.stop()
    return [{
        "minutes": seconds / 60,
        "requests": tally.whole + tally.cut + len(tally.lost),
        "tokens/s": tally.num_tokens / seconds,
        "re-maps": len(took),
        "re-maps refused": failed,
        "slowest re-map s": max(took, default=0.0),
        **tally.as_row(),
        "drained and ended after s": ended,
        "resident MB": resident / 2**20,
    }]  # fmt: skip


SHOWN = {
    "load": show_load, "prefix": show_prefix, "kill": show_kill, "rollback": show_rollback, "scale": show_scale,
    "soak": show_soak,
}  # fmt: skip


def print_table(console: Console, name: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=name, title_justify="left", show_edge=False)
    table.add_column("")
    for number in range(len(rows)):
        table.add_column(str(number + 1), justify="right")
    for key in dict.fromkeys(key for row in rows for key in row):
        values = (row.get(key, "") for row in rows)
        table.add_row(key, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
    console.print()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config", type=Path, default=Path("config/model_config.yaml"), help="with sources fp8 and int4"
    )
    parser.add_argument("--shows", nargs="+", choices=SHOWS, default=SHOWS)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--clients", type=int, default=8, help="that ask at a time; of load, for each replica")
    parser.add_argument("--rounds", type=int, default=5, help="of load")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 3], help="of kill")
    parser.add_argument("--folder", type=Path, help="keeps logs; default: temporary")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    arguments = parser.parse_args()
    exit_on_signals()
    console = Console(quiet=arguments.json)
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments, folder)
        for show in arguments.shows:
            found[show] = SHOWN[show](bench)
            print_table(console, show, found[show])
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), **found}))
    return int(any(row.get("lost", 0) for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
