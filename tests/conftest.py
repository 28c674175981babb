"""What tests of several packages share."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.engine import core
from amalgam.formats.grid import QuantizeOptions

# Kernels of a GPU run in Triton's interpreter where there is none. Triton looks when it is imported, which any test may
# be the first to do; the conftest of its tests looks before any hook is called.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"

# Longest first: whoever got one of them last would work alone at the end.
LONG = (
    "models/test_config_fields.py", "server/dashboard/test_whole_page.py", "test_readme.py", "kernels/test_panels.py",
    "server/dashboard/test_experts.py", "server/dashboard/test_weights.py", "server/chat/test_conversations.py",
    "cli/test_plan_budget.py", "runtime/test_autoplan.py", "models/test_parity.py", "server/chat/test_surroundings.py",
    "server/chat/test_answers.py", "server/dashboard/test_absence.py", "server/dashboard/test_playground.py",
    "models/program/test_families.py", "runtime/test_deployment.py", "test_planning_docs.py",
    "composition/test_calibrated.py", "server/test_lifecycle.py", "server/test_faults.py", "kernels/test_new_isa.py",
    "server/test_description.py", "tools/test_estimate.py", "test_llm.py", "cli/test_quantize.py",
)  # fmt: skip
FOLDER_NUMBERS = itertools.count()
CONFIG = """
model:
  name: demo
  base_path: {demo}
  mixed_precision:
    fp8_path: {derived}/fp8
    int4_path: {derived}/int4
    weight_mapping:
      "model.layers.*.mlp.experts.*": int4
      "model.layers.*.mlp.experts.{{0-3}}.*": fp8
      "model.layers.0.mlp.experts.0.down_proj.weight": base
"""


def pytest_configure() -> None:
    """The same everywhere: one thread computes, since several processes share the cores, and no terminal has a size."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    # Certificates of the world, which no test needs: httpx reads them for each client, in 50 ms.
    os.environ["SSL_CERT_DIR"] = str(ROOT / "tests")
    os.environ.pop("SSL_CERT_FILE", None)  # which would go first
    # Requests without a seed of their own draw it from the sequence that each test begins anew.
    core.secrets = SimpleNamespace(randbelow=random.randrange)  # type: ignore[assignment]
    gc.disable()
    let_signals_come()


def let_signals_come() -> None:
    """In the background, and behind `nohup`, a shell has them ignored, and so would be whoever is started by a test.

    What has a handler is not ignored any more after an `exec`.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, lambda *_: None),
        (signal.SIGHUP, lambda *_: None),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Each of the processes that share all tests imports another part of them first: what one compiles all find."""
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{end}", "") for end in ("", "_COUNT"))
    if worker and session.config.args == session.config.getini("testpaths"):
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        for file in files[int(worker.removeprefix("gw")) :: int(count)]:
            with contextlib.suppress(Exception, pytest.skip.Exception):  # pytest will tell
                importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"tests/{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def pytest_collection_finish() -> None:
    """After all imports."""
    # pytest puts its handlers into each logger that does not propagate, six times a test, and torch has forty of them.
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.startswith(("torch", "strobelight")) and "__" not in name:
            logger.propagate = True
    # Modules and tests stay: to look for garbage among their millions of objects takes a second each time.
    gc.freeze()
    gc.unfreeze = lambda: None  # which brings all of it back: a benchmark does at its end
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever a test and its fixtures draw without a seed of their own is the same each time."""
    random.seed(0)
    np.random.seed(0)
    # For a device that is not in use torch.manual_seed writes down its whole stack, in milliseconds.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's own, which reads the names of all folders made before in order to find a number that is free."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}_{next(FOLDER_NUMBERS)}"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="session")
def context() -> ForkServerContext:
    """Forks processes from one that has imported everything already: the start of an interpreter is seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.server.fakes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads compute."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made by one of the processes that share the tests, and only read by all."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with folder.with_suffix(".made").open("a+") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        if not os.fstat(note.fileno()).st_size:
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            note.write("made")
    return folder


@pytest.fixture(scope="session")
def derived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo model's fp8 and int4 checkpoints."""

    def make(folder: Path) -> None:
        quantize_checkpoint(str(DEMO), folder / "fp8", "fp8", QuantizeOptions(scale="block"))
        quantize_checkpoint(str(DEMO), folder / "int4", "int4", QuantizeOptions())

    return made_once(tmp_path_factory, "derived", make)


@pytest.fixture
def demo_config(derived: Path, tmp_path: Path) -> Path:
    """A configuration that maps the demo model across bf16, fp8 and int4."""
    return write_demo_config(tmp_path, derived)


def write_demo_config(folder: Path, derived: Path) -> Path:
    path = folder / "model_config.yaml"
    path.write_text(CONFIG.format(demo=DEMO, derived=derived))
    return path
