"""What signals leave of a verb at work: its exit code, and no temporary files."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from tests.cli.verb import run_verb
from tests.conftest import DEMO
from tests.errors import raises
from tests.server.conftest import wait_until
from torch import Tensor

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.composition.quantizing.weights import Quantized, WeightQuantizer
from amalgam.errors import ConflictError
from amalgam.formats.grid import QuantizeOptions

CONFIG = """
model:
  base_path: {demo}
  mixed_precision:
    int4_path: {folder}/int4
    derived:
      int4: {{format: int4, group_size: 32}}
    weight_mapping: {{"model.layers.*.mlp.experts.*": int4}}
server: {{port: 0}}
"""
Start = Callable[..., ForkServerProcess]


def run_slowly(log: Path, arguments: tuple[str, ...]) -> None:
    """A verb that is not done before whoever looks at it has seen that it is at work."""
    make = WeightQuantizer.alone

    def alone(quantizer: WeightQuantizer, name: str, weight: Tensor) -> Quantized:
        time.sleep(0.3)
        return make(quantizer, name, weight)

    WeightQuantizer.alone = alone  # type: ignore[method-assign]
    run_verb(log, arguments)


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the standard error output of the verb goes."""
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture
def start(context: ForkServerContext, log: Path) -> Iterator[Start]:
    """Starts a verb in a process of its own: `start("quantize", …)`."""
    processes = []

    def start(*arguments: str) -> ForkServerProcess:
        process = context.Process(target=run_slowly, args=(log, arguments))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def is_being_written(folder: Path) -> bool:
    return any(folder.glob(".*.partial"))


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [("quantize", signal.SIGINT, 130), ("quantize", signal.SIGTERM, 143), ("serve", signal.SIGTERM, 0)],
)
def test_a_signal_ends_what_is_being_made(
    tmp_path: Path, start: Start, log: Path, verb: str, number: signal.Signals, code: int
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(demo=DEMO, folder=tmp_path))
    if verb == "quantize":
        process = start("quantize", str(DEMO), str(tmp_path / "int4"), "--format", "int4", "--group-size", "32")
    else:
        process = start("serve", "--config", str(tmp_path / "config.yaml"))
    wait_until(lambda: is_being_written(tmp_path))
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    stderr = log.read_text()
    assert "terminate" not in stderr and "Traceback" not in stderr
    assert ("Interrupted. The same command goes on with what is done.\n" in stderr) == (number == signal.SIGINT)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}


def test_a_second_process_is_refused_and_what_a_killed_one_has_left_goes(tmp_path: Path, start: Start) -> None:
    process = start("quantize", str(DEMO), str(tmp_path / "int4"), "--format", "int4")
    wait_until(lambda: is_being_written(tmp_path))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # it holds its lock, and is not done meanwhile
    with raises(ConflictError, "int4", process.pid):
        quantize_checkpoint(str(DEMO), tmp_path / "int4", "int4", QuantizeOptions())
    process.kill()
    process.join()
    assert is_being_written(tmp_path)
    quantize_checkpoint(str(DEMO), tmp_path / "int4", "int4", QuantizeOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"int4"}
