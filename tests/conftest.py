"""What tests of several packages share."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import itertools
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amalgam.composition.quantize import quantize_checkpoint
from amalgam.engine import core
from amalgam.formats.grid import QuantizeOptions
from amalgam.text.tokenizer import Tokenizer

# Kernels of a GPU run in Triton's interpreter where there is none. Triton looks when it is imported, which any test may
# be the first to do; the conftest of its tests looks before any hook is called.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"

# Files that share what takes long to make, and so a process: one browser, or the classes of transformers and the models
# made with them. All others are units of their own.
TOGETHER = {
    "models": (
        "models/", "composition/", "calibration/", "pruning/", "training/", "tools/test_export",
    ),
    "pages": ("server/dashboard/", "server/chat/"),
}  # fmt: skip
# Longest units first: whoever got one of them last would work alone at the end.
LONG = (
    "models", "pages", "test_readme.py", "kernels/test_panels.py", "cli/test_plan_budget.py",
    "runtime/test_autoplan.py", "test_llm.py", "kernels/test_attention.py", "runtime/test_deployment.py",
    "runtime/test_any_company.py",
    "kernels/test_new_isa.py", "text/test_gguf.py", "cli/test_cli.py", "server/test_description.py",
    "server/test_lifecycle.py", "tools/test_estimate.py", "runtime/test_faults.py", "test_planning_docs.py",
    "cli/test_streams.py", "cli/test_generate.py", "cli/test_distill.py", "server/test_faults.py",
    "cli/test_quantize.py",
)  # fmt: skip
FOLDER_NUMBERS = itertools.count()
DEMO_TOKENIZER = DEMO / "tokenizer.json"
TOKENIZERS: dict[bytes, Tokenizer] = {}
read_tokenizer = Tokenizer.load.__func__  # type: ignore[attr-defined]
# Weights are packed once for all, which takes most of an opening.
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
inference:
  packed_cache: {derived}/packed
"""


def pytest_configure(config: pytest.Config) -> None:
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
    Tokenizer.load = classmethod(load_tokenizer)  # type: ignore[method-assign, assignment]
    gc.disable()
    let_signals_come()
    for plugin in config.pluginmanager.get_plugins():
        if type(plugin).__name__ == "WorkerInteractor" and not config.getoption("xmlpath"):
            spare_messages(plugin)


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


def spare_messages(worker: Any) -> None:
    """Of the six messages of a test, which take as long as a small test does, the one with its result is enough.

    Setups and teardowns are told if they failed, or took a time that one might look for: `--durations` has no others.
    """
    send = worker.sendevent

    def send_some(name: str, **content: Any) -> None:
        report = content.get("data", {})
        is_quiet = name == "testreport" and report["when"] != "call" and report["outcome"] == "passed"
        if name not in ("logstart", "logfinish") and not (is_quiet and report["duration"] < 0.01):
            send(name, **content)

    worker.sendevent = send_some


def load_tokenizer(
    cls: type[Tokenizer],
    folder: Path,
    gguf_metadata: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """As `Tokenizer.load`, but that of the demo once in a process, and so its remarks in the log."""
    files = sorted(folder.iterdir()) if (folder / "tokenizer.json").is_file() else []
    is_plain = all(file.is_file() and not file.is_symlink() for file in files)
    if not (is_plain and DEMO_TOKENIZER.stat().st_size in (file.stat().st_size for file in files)):
        return read_tokenizer(cls, folder, gguf_metadata, chat_template)
    digest = hashlib.sha256(repr(chat_template).encode())
    for file in files:
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    key = digest.digest()
    if key not in TOKENIZERS:
        TOKENIZERS[key] = read_tokenizer(cls, folder, gguf_metadata, chat_template)
    return TOKENIZERS[key]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By files, as `--dist loadfile` does, but for those that share a process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByUnits(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return ByUnits(config, log)


def unit_of(nodeid: str) -> str:
    """Whose process a test shares."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((unit for unit, places in TOGETHER.items() if file.startswith(places)), file)


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
    ranks = {unit: rank for rank, unit in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(unit_of(item.nodeid), len(ranks)))


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
