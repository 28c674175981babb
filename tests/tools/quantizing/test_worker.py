"""What runs in a tool's environment, beside stand-ins for the tools' packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from amalgam.tools.quantizing import worker

JOB: dict[str, Any] = {
    "tool": "auto-round",
    "method": "signround",
    "model": "/a/model",
    "out": "/a/folder",
    "weights": {"num_bits": 4, "group_size": 32, "symmetric": False},
    "iterations": 7,
    "token_ids": [[1, 2, 3, 4], [5, 6], [7, 8, 9]],
    "sequence_length": 4,
}
STAND_IN = """
import json, sys, time
from tqdm import tqdm
class AutoRound:
    def __init__(self, model, **options):
        options["dataset"] = [batch.tolist() for batch in options["dataset"]]
        self.options = options
    def quantize_and_save(self, out, format):
        for _ in tqdm(range(3), desc="layers", mininterval=0):
            print("chatter")
        print(json.dumps({"out": out, "format": format, **self.options}), file=sys.stderr)
        time.sleep(SECONDS)
"""
NO_TORCH = """
class Rows(list):
    def tolist(self):
        return list(self)
tensor = Rows
class cuda:
    is_available = staticmethod(lambda: False)
"""


def start(folder: Path, seconds: float, *, leads_group: bool = False, more: str = "") -> subprocess.Popen[str]:
    (folder / "auto_round.py").write_text(more + STAND_IN.replace("SECONDS", str(seconds)))
    (folder / "torch.py").write_text(NO_TORCH)
    job = folder / "job.json"
    job.write_text(json.dumps(JOB))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, worker.__file__, str(job)],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
        start_new_session=leads_group,
    )


def test_a_job_reaches_the_tool_and_bars_are_told(tmp_path: Path) -> None:
    process = start(tmp_path, 0)
    assert process.stdout is not None and process.stderr is not None
    lines, said = process.stdout.read(), process.stderr.read()
    assert process.wait() == 0, said
    assert {"what": "layers", "done": 3, "total": 3} in [json.loads(line) for line in lines.splitlines()]
    assert "chatter" in said
    options = json.loads(said.splitlines()[-1])
    assert options["out"] == "/a/folder" and options["format"] == "auto_round" and options["trust_remote_code"] is False
    assert options["enable_torch_compile"] is False
    assert options["disable_opt_rtn"] is True and options["disable_model_free"] is True, "or it fetches texts"
    assert (options["bits"], options["group_size"], options["sym"], options["iters"]) == (4, 32, False, 7)
    assert options["dataset"] == [[[1, 2, 3, 4], [5, 6, 7, 8]]] and options["seqlen"] == 4 and options["nsamples"] == 2


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    process = start(tmp_path, 3600)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()  # it is at work
    process.stdin.close()
    assert process.wait() == 1


def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    fork = "import os, time\nif os.fork() == 0:\n    time.sleep(3600)\n    os._exit(0)\n"
    process = start(tmp_path, 3600, leads_group=True, more=fork)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    process.stdout.read()  # ends when nobody has the pipe any more
    assert process.wait() == -signal.SIGKILL
