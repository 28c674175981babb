"""Does the monitoring show what there is to see? Prometheus itself scrapes real servers, and answers every query.

    python benchmarks/monitoring.py [--config config/model_config.yaml] [--seconds 90] [--folder DIR] [--html BOARD]

Needs `prometheus` and `promtool` (Debian: apt install prometheus). Two servers of one model, one of them guessing
tokens ahead, are sent labelled prompts, requests that are refused, changes of the weights that succeed and one that
fails, a shadow and a canary. Then Prometheus is asked for its targets, for the health of all rules, and for every query
of the board: it must take each, and each must have data.

`--html` draws the panels' queries as Prometheus answers them, one chart for each panel.
Prints tables and, as the last line, one JSON object; with `--json` nothing else. Exits with 1 if anything is amiss.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from engines import Child, exit_on_signals, free_port
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amalgam.server.metrics.board import BOARD, RULES
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
SCRAPE_SECONDS = 2
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "30s"}
PROMPTS = ("It was a dark and stormy night, and", "def fibonacci(n):\n", "床前明月光，", "The captain said")
_COLUMNS = 3


def call(url: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"null")


def start_server(config: Path, folder: Path, name: str, *flags: str) -> str:
    """The address of a server that takes requests."""
    port = free_port()
    command = [sys.executable, ROOT / "main.py", "--config", config, "--port", str(port), *flags]
    url = f"http://127.0.0.1:{port}"
    Child(command, folder / f"{name}.log").wait_until(lambda: call(f"{url}/ready") is not None)
    return url


def save_reference(server: str, path: Path) -> None:
    """Keep what some prompts have activated, which drift is measured from."""
    for seed, prompt in enumerate(PROMPTS[:2]):
        call(f"{server}/generate", {"prompt": prompt, "max_new_tokens": 32, "seed": seed})
    with urllib.request.urlopen(f"{server}/experts/set.npz", timeout=60) as answer:
        path.write_bytes(answer.read())


def start_prometheus(folder: Path, servers: list[str]) -> str:
    port = free_port()
    targets = [server.removeprefix("http://") for server in servers]
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": [str(ROOT / path) for path in RULES],
        "scrape_configs": [{"job_name": "amalgam", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    flags = [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    flags.append(f"--web.listen-address=127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}"
    Child(["prometheus", *flags], folder / "prometheus.log").wait_until(
        lambda: bool(call(f"{url}/api/v1/targets")["data"]["activeTargets"])
    )
    return url


def send_traffic(servers: list[str], until: float) -> None:
    """Prompts, some of them the same, and some requests that are refused, until that time."""

    def one(number: int) -> None:
        server, prompt = servers[number % len(servers)], PROMPTS[number // 2 % len(PROMPTS)]
        with suppress(urllib.error.HTTPError):
            if number % 20 == 0:
                call(f"{server}/generate", {"prompt": prompt, "max_new_tokens": 0})
            call(f"{server}/generate", {"prompt": prompt, "max_new_tokens": 48, "seed": number})

    numbers = iter(range(10**9))

    def client() -> None:
        while time.monotonic() < until:
            one(next(numbers))

    with ThreadPoolExecutor(6) as pool:
        for outcome in [pool.submit(client) for _ in range(6)]:
            outcome.result()


def change_weights(server: str) -> None:
    """A change that succeeds and one that fails, a shadow, and a canary that is stopped."""
    mapping = "/update_weight_mapping"
    call(server + mapping, {"weight_mapping": {"model.layers.0.mlp.experts.*": "fp8"}})
    with suppress(urllib.error.HTTPError):
        call(server + mapping, {"weight_mapping": {"model.layers.0.mlp.experts.*": "nowhere"}})
    call(f"{server}/weights/named/small", {"weight_mapping": {"model.layers.*.mlp.experts.*": "int4"}}, "PUT")
    call(f"{server}/weights/shadow", {"weights": "small", "share": 1.0}, "PUT")
    time.sleep(20)
    call(f"{server}/weights/shadow", method="DELETE")
    call(f"{server}/weights/canary", {"weights": "small", "share": 0.3}, "PUT")


def answers(prometheus: str, path: str, **parameters: Any) -> Any:
    try:
        return call(f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")["data"]
    except urllib.error.HTTPError as error:
        raise ValueError(json.loads(error.read())["error"]) from None


def filled(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def board_panels() -> list[dict[str, Any]]:
    panels = json.loads((ROOT / BOARD).read_text())["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


def query_board(prometheus: str) -> list[dict[str, Any]]:
    """Of each query of the board how many series it has, and why it has none."""
    rows = []
    for panel in board_panels():
        for target in panel["targets"]:
            row: dict[str, Any] = {"panel": panel["title"], "expression": target["expr"], "series": 0, "error": None}
            try:
                found = answers(prometheus, "query", query=filled(target["expr"]))["result"]
                # A quantile of nothing is NaN, which no chart draws.
                row["series"] = sum(not math.isnan(float(series["value"][1])) for series in found)
            except ValueError as error:
                row["error"] = str(error)
            rows.append(row)
    return rows


def rule_states(prometheus: str) -> list[dict[str, Any]]:
    groups = answers(prometheus, "rules")["groups"]
    return [
        {"name": rule["name"], "health": rule["health"], "state": rule.get("state", ""), "error": rule.get("lastError")}
        for group in groups
        for rule in group["rules"]
    ]


def named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def draw(prometheus: str, seconds: float, path: Path) -> None:
    """The board's panels as charts in one page."""
    panels, end = board_panels(), time.time()
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = make_subplots(
        rows, _COLUMNS, subplot_titles=[panel["title"] for panel in panels], vertical_spacing=0.25 / rows
    )
    for index, panel in enumerate(panels):
        for target in panel["targets"]:
            data = answers(
                prometheus,
                "query_range",
                query=filled(target["expr"]),
                start=end - seconds,
                end=end,
                step=SCRAPE_SECONDS,
            )
            for series in data["result"]:
                name = named(target["legendFormat"], series["metric"])
                times, values = zip(*series["values"], strict=True)
                line = go.Scatter(x=[second - end for second in times], y=[float(value) for value in values], name=name)
                figure.add_trace(line, index // _COLUMNS + 1, index % _COLUMNS + 1)
    figure.update_layout(height=240 * rows, width=1500, showlegend=False, template="plotly_white", margin_t=60)
    figure.update_yaxes(rangemode="tozero")
    figure.write_html(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "config/model_config.yaml")
    parser.add_argument("--seconds", type=float, default=90, help="how long there is traffic")
    parser.add_argument("--folder", type=Path, help="keeps logs and Prometheus' data; a temporary one otherwise")
    parser.add_argument("--html", type=Path, help="draw the board into this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        parser.error("prometheus is not installed (Debian: apt install prometheus)")
    exit_on_signals()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="amalgam-monitoring-"))
    folder.mkdir(parents=True, exist_ok=True)
    guessing = start_server(options.config, folder, "guessing", "--speculation", "ngram")
    save_reference(guessing, reference := folder / "reference.npz")
    plain = start_server(options.config, folder, "plain", "--statistics.reference", str(reference))
    servers = [guessing, plain]
    prometheus = start_prometheus(folder, servers)
    traffic = threading.Thread(target=send_traffic, args=[servers, time.monotonic() + options.seconds])
    traffic.start()
    time.sleep(5)
    change_weights(plain)
    traffic.join(max(0.0, options.seconds - 3))
    targets = answers(prometheus, "targets")["activeTargets"]
    rules, queries = rule_states(prometheus), query_board(prometheus)
    if options.html:
        draw(prometheus, options.seconds, options.html)
    traffic.join()

    amiss = [target["scrapeUrl"] for target in targets if target["health"] != "up"]
    amiss += [f"{rule['name']}: {rule['error']}" for rule in rules if rule["health"] != "ok"]
    amiss += [f"{row['expression']}: {row['error']}" for row in queries if row["error"]]
    empty = [row for row in queries if not row["series"] and not row["error"]]
    amiss += [f"no data: {row['expression']}" for row in empty]
    result = {
        "command": " ".join(sys.argv),
        "targets_up": sum(target["health"] == "up" for target in targets),
        "rules_ok": sum(rule["health"] == "ok" for rule in rules),
        "queries": len(queries),
        "queries_with_data": sum(row["series"] > 0 for row in queries),
        "alerts": {rule["name"]: rule["state"] for rule in rules if rule["state"] not in ("", "inactive")},
        "amiss": amiss,
        "commit": commit(),
        "hardware": hardware(),
    }
    if not options.json:
        table = Table("panel", "series", "query", title="The board's queries", show_edge=False)
        for row in queries:
            table.add_row(row["panel"], str(row["series"]), Text(row["expression"]))
        Console(width=200).print(table)
        for problem in amiss:
            print("amiss:", problem)
    print(json.dumps(result, ensure_ascii=False))
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main())
