"""What recording costs: expert statistics off, on, and with full traces (`routed_experts`), on shape S.

Engines that share one model and differ in nothing but their observer take turns, in an order that changes from round to
round, so that whatever else the machine does hits all of them. A round gives one ratio to the engine without recording;
the medians of the ratios and their quartiles are reported. Beside it stands what the observer's calls took by the step
thread's processor time, per step, which other processes disturb little.

Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from amalgam.base.histogram import Histogram
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation, RequestOutput
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.decoder import Decoder
from amalgam.models.registry import read_spec
from amalgam.models.routing import RoutingObserver, RoutingTrace, TokenSpan
from amalgam.tools.bench import SHAPES, commit, hardware, random_weights, word_tokenizer

PROMPT_TOKENS = 8
KINDS = ("off", "statistics", "traces")


class TimedObserver:
    """Passes everything on to a tracker, and adds up the processor time that this takes in the step thread."""

    def __init__(self, tracker: ExpertTracker) -> None:
        self._tracker = tracker
        self.clear()

    def clear(self) -> None:
        self.num_steps = 0
        self.seconds = 0.0

    def admit(self, request_id: int, label: str | None, num_traced_tokens: int) -> None:
        self._tracker.admit(request_id, label, num_traced_tokens)

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        self._timed(self._tracker.begin_step, spans)

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self._timed(self._tracker.observe, layer_id, expert_ids, gate_weights)

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self._timed(self._tracker.observe_all, expert_ids, gate_weights)

    def end_step(self, rejected: Mapping[int, int] | None = None) -> None:
        self.num_steps += 1
        self._timed(self._tracker.end_step, rejected)

    def count_request(self, label: str | None) -> None:
        self._timed(self._tracker.count_request, label)

    def distinct_experts(self) -> Histogram:
        return self._tracker.distinct_experts()

    def take_trace(self, request_id: int) -> RoutingTrace | None:
        return self._timed(self._tracker.take_trace, request_id)

    def close(self) -> None:
        self._tracker.close()

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.thread_time()
        try:
            return call(*arguments)
        finally:
            self.seconds += time.thread_time() - started


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    recording: str
    sequences: int
    tokens_per_second: float  # median
    cost: float  # median of 1 - throughput / throughput without recording
    quartiles: tuple[float, float]  # of the same
    microseconds_per_step: float  # in the observer, by processor time
    share_of_step: float  # those over the median time of a step without recording


def make_settings(longest: int, batch: int) -> Settings:
    return build_settings(
        {
            "model": {"base_path": "unused"},
            "inference": {"max_seq_length": longest, "max_batch_size": batch, "device_map": "cpu"},
            "engine": {"max_step_tokens": 512},
        }
    )


def decode_seconds(engine: Engine, num_sequences: int, num_tokens: int, observation: Observation) -> float:
    """Seconds per step between the first step that all sequences take part in and the end of the last."""
    params = SamplingParams(max_new_tokens=num_tokens, do_sample=False, ignore_eos=True)
    arrivals: dict[int, list[float]] = {}
    finished: SimpleQueue[RequestOutput] = SimpleQueue()

    def on_output(output: RequestOutput) -> None:
        arrivals.setdefault(output.request_id, []).append(time.perf_counter())
        if output.is_finished:
            finished.put(output)

    for index in range(num_sequences):
        engine.submit(
            [(index * PROMPT_TOKENS + i) % 1000 for i in range(PROMPT_TOKENS)], params, on_output, observation
        )
    for _ in range(num_sequences):
        if (error := finished.get().error) is not None:
            raise error
    first = max(times[0] for times in arrivals.values())
    last = max(times[-1] for times in arrivals.values())
    return (last - first) / (num_tokens - 1)


def measure(
    engines: Mapping[str, Engine], observers: Mapping[str, TimedObserver], batch: int, tokens: int, rounds: int
) -> list[Result]:
    """All kinds of recording with `batch` sequences of `tokens` tokens each."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):  # the first warms up
        order = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
        for kind in order[:: -1 if number % 2 else 1]:
            taken = decode_seconds(engines[kind], batch, tokens, Observation(wants_trace=kind == "traces"))
            if number:
                seconds[kind].append(taken)
        if not number:
            for observer in observers.values():
                observer.clear()
    off = statistics.median(seconds["off"])
    results = []
    for kind in KINDS:
        costs = [1 - before / after for before, after in zip(seconds["off"], seconds[kind], strict=True)]
        lower, middle, upper = statistics.quantiles(costs, n=4)
        observer = observers.get(kind)
        per_step = observer.seconds / observer.num_steps if observer else 0.0
        speed = batch / statistics.median(seconds[kind])
        results.append(Result(kind, batch, speed, middle, (lower, upper), per_step * 1e6, per_step / off))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int4", help="a format, or mixed")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=48, help="of each sequence in a round")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()

    _, spec = read_spec(SHAPES["S"], "shape S")
    device, dtype = torch.device("cpu"), torch.bfloat16
    longest = PROMPT_TOKENS + arguments.tokens
    settings = make_settings(longest, max(arguments.sequences))
    version = random_weights(spec, arguments.weights, settings.inference, device)
    decoder = Decoder(spec, longest, dtype, device)
    tokenizer = word_tokenizer(spec.vocab_size)
    observers = {
        kind: TimedObserver(
            ExpertTracker(spec.moe_layer_ids, spec.num_experts, spec.num_active_experts, settings.statistics)
        )
        for kind in KINDS
        if kind != "off"
    }

    def make_engine(observer: RoutingObserver | None) -> Engine:
        return Engine(decoder, version, tokenizer, settings, device, dtype, observer)

    engines = {kind: make_engine(observers.get(kind)) for kind in KINDS}
    for engine in engines.values():
        engine.start()
    results = []
    try:
        for batch in arguments.sequences:
            results += measure(engines, observers, batch, arguments.tokens, arguments.rounds)
    finally:
        for engine in engines.values():
            engine.stop()

    table = Table("recording", "seqs", "tokens/s", "cost %", "quartiles %", "µs/step", "% of a step")
    for result in results:
        low, high = (f"{100 * value:+.2f}" for value in result.quartiles)
        speed, cost = f"{result.tokens_per_second:.1f}", f"{100 * result.cost:+.2f}"
        own = f"{result.microseconds_per_step:.0f}", f"{100 * result.share_of_step:.2f}"
        table.add_row(result.recording, str(result.sequences), speed, cost, f"{low} to {high}", *own)
    Console(width=100).print(table)
    rows = [asdict(result) for result in results]
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": rows}))


if __name__ == "__main__":
    main()
