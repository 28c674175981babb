from pathlib import Path

import pytest
import torch

from amalgam.engine.core import Engine
from amalgam.engine.speculation.speculator import Speculator
from amalgam.text.tokenizer import Tokenizer
from tests.engine.fakes import VOCAB_SIZE, FakeDecoder, FakeVersion, FunctionProposer, make_settings
from tests.engine.running import GREEDY, Outputs

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(DEMO)


@pytest.fixture
def make_engine(tokenizer):
    """Engines over a `FakeDecoder`, stopped at the end; their settings are those of `make_settings`."""
    engines = []

    def make(decoder=None, version=None, observer=None, propose=None, starts=True, speculator=None, **settings):
        if propose is not None:
            speculator = Speculator("function", FunctionProposer(propose), 8, VOCAB_SIZE)
        engine = Engine(
            decoder or FakeDecoder(),
            version or FakeVersion(1),
            tokenizer,
            make_settings(**settings),
            torch.device("cpu"),
            torch.float32,
            observer,
            speculator,
        )
        engines.append((engine, decoder))
        if starts:
            engine.start()
        return engine

    yield make
    for engine, decoder in engines:
        if decoder is not None:
            decoder.gate.set()
        engine.stop()


@pytest.fixture
def submit():
    def submit(engine, prompt_ids, params=GREEDY):
        outputs = Outputs()
        outputs.request_id = engine.submit(prompt_ids, params, outputs)
        return outputs

    return submit
