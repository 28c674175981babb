"""What tests of a running engine share."""

import random
import threading
import time

from amalgam.engine.params import SamplingParams
from tests.engine.fakes import VOCAB_SIZE, FakeDecoder, kv_cache_bytes

GREEDY = SamplingParams(max_new_tokens=12, do_sample=False, ignore_eos=True)
TINY_CACHE = {"max_seq_length": 64, "kv_cache_bytes": kv_cache_bytes(20)}


def random_prompts(count, max_length=50, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, max_length))] for _ in range(count)]


def wait_until(condition, seconds=60):
    """Wait for what must come; the time only ends what would hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def is_at_rest(engine):
    status = engine.status()
    return status.num_running == status.num_waiting == 0 and status.num_free_blocks == status.num_blocks


def all_made(monkeypatch, module, name):
    """What a module makes of a class from now on, in order."""
    made, make = [], getattr(module, name)

    def keep(*arguments, **keywords):
        made.append(make(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(module, name, keep)
    return made


class Failing:
    """A callback that raises."""

    def __init__(self, error):
        self.error = error
        self.num_calls = 0

    def __call__(self, *told):
        self.num_calls += 1
        raise self.error


class Outputs:
    """A callback that keeps what it gets."""

    def __init__(self):
        self.all = []
        self._done = threading.Event()

    def __call__(self, output):
        self.all.append(output)
        if output.is_finished:
            assert not self._done.is_set(), "a second last output"
            self._done.set()

    def last(self):
        assert self._done.wait(60), "never finished"
        return self.all[-1]

    @property
    def num_last(self):
        return sum(output.is_finished for output in self.all)

    @property
    def token_ids(self):
        return tuple(token_id for output in self.all for token_id in output.token_ids)

    @property
    def text(self):
        return "".join(output.text for output in self.all)


def held_engine(make_engine, **settings):
    """An engine whose first step begins and does not end before `decoder.gate` is set."""
    decoder = FakeDecoder()
    decoder.gate.clear()
    return make_engine(decoder, **settings), decoder
