"""Which experts answer English prose, Chinese verse and Python? Sends prompts of each and prints the busiest experts.

    python examples/test_expert_tracking.py [--base-url URL]

If no server answers there, it starts one with config/model_config.yaml on a free port, and stops it at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.test_client import DEFAULT_BASE_URL, APIError, MixedPrecisionAPIClient  # noqa: E402

START_SECONDS = 600  # the first start also makes the fp8 and int4 checkpoints
PROMPTS = {
    "English prose": ["It was a dark and stormy night, and", "The captain looked at the sea and said"],
    "Chinese verse": ["床前明月光，", "春眠不觉晓，"],
    "Python": ["def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n"],
}


@contextlib.contextmanager
def running_server(base_url: str) -> Iterator[MixedPrecisionAPIClient]:
    """A client for the server at `base_url`, or for one that is started for the while."""
    client = MixedPrecisionAPIClient(base_url)
    try:
        client.health_check()
    except APIError as error:
        if error.status:
            raise
        print(f"No server at {base_url}: starting one with config/model_config.yaml ...", flush=True)
    else:
        wait_until_ready(client)
        yield client
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # main.py finds the package of a checkout that is not installed; the folder of `amalgam demo` has none.
    serve = ["main.py"] if (ROOT / "main.py").exists() else ["-m", "amalgam.cli", "serve"]
    command = [sys.executable, *serve, "--config", "config/model_config.yaml", "--host", "127.0.0.1"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
        try:
            client = MixedPrecisionAPIClient(f"http://127.0.0.1:{port}")
            wait_until_ready(client, process)
            yield client
        except APIError:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(client: MixedPrecisionAPIClient, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if client.health_check()["status"] == "healthy":
                return
        except APIError as error:
            if process is None or error.status:
                raise
        if process is not None and process.poll() is not None:
            raise APIError(0, f"The server ended with exit code {process.returncode} before it was ready.")
        if time.monotonic() > deadline:
            raise APIError(0, f"The server was not ready after {START_SECONDS} s.")
        time.sleep(0.2)


def experts_used_by(client: MixedPrecisionAPIClient, prompts: list[str], max_new_tokens: int) -> dict[str, Any]:
    """The expert statistics of these prompts alone. Forgets what the server has counted before."""
    client.reset_expert_stats()
    client.batch_generate(prompts=prompts, max_new_tokens=max_new_tokens, seed=1)
    return client.get_expert_stats(top_k=5)


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in [heads, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def report(domain: str, stats: dict[str, Any]) -> None:
    summary = stats["summary"]
    print(f"\n{domain}: {summary['total_tokens']} tokens, {summary['total_activations']} activations")
    rows = [
        [
            str(expert["layer_id"]),
            str(expert["expert_id"]),
            str(expert["activation_count"]),
            f"{100 * expert['layer_share']:.1f}%",
        ]
        for expert in stats["top_experts"]
    ]
    print_table(["layer", "expert", "activations", "of its layer"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="per prompt (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        with running_server(arguments.base_url) as client:
            for domain, prompts in PROMPTS.items():
                report(domain, experts_used_by(client, prompts, arguments.max_new_tokens))
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show every character
    sys.exit(main())
