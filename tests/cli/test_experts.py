"""`amalgam experts` against a server of the demo model, on screens of several sizes, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from rich.console import Console
from tests.conftest import DEMO
from tests.server.conftest import serving, wait_until_ready

from amalgam.cli import main
from amalgam.cli.experts_view import page, screen, visible
from amalgam.config.settings import build_settings
from amalgam.experts.overview import build_overview
from amalgam.experts.saved.files import load, to_bytes
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan
from amalgam.runtime.opening import open_deployment

SHADES = set("·░▒▓█")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["experts", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has answered an English and a Chinese prompt."""
    settings = build_settings(
        {
            "model": {"base_path": str(DEMO)},
            "inference": {"max_seq_length": 128},
            "server": {"port": 0, "export_dir": str(tmp_path_factory.mktemp("exports"))},
        }
    )
    with serving(settings, lambda: open_deployment(settings)) as address:
        wait_until_ready(address)
        for domain, prompt in (("en", "The captain looked at the sea"), ("zh", "春风又绿江南岸")):
            body = {"prompt": prompt, "max_new_tokens": 8, "domain": domain}
            httpx.post(address + "/generate", json=body, timeout=60).raise_for_status()
        yield address


@pytest.fixture
def saved(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What the server has counted, in a file."""
    path = tmp_path / "server.safetensors"
    code, out, err = run(capsys, "--url", url, "--save", str(path))
    assert (code, out) == (0, "") and "Saved" in err and not path.read_bytes().startswith(b"PK")
    assert httpx.get(url + "/experts/sets", timeout=60).json() == {"sets": []}  # nothing of it stays with the server
    return path


def test_a_server_s_statistics_are_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--url", url, "--top-k", "3")
    assert code == 0
    answer = httpx.get(url + "/expert_stats?top_k=3", timeout=60).json()
    lines = out.splitlines()
    total = answer["summary"]["total_tokens"]
    assert lines[0] == f"{total * 24:,} activations = {total} tokens × 4 experts × 6 layers; 2 requests"
    assert "now (half-life 5 min)" in lines[1] and "since the last reset" in lines[1] and "tokens/s" in lines[1]
    assert lines[2] == "Tokens by domain: " + ", ".join(f"{row['label']} {row['tokens']}" for row in answer["labels"])
    assert lines[3].split() == ["layer", *map(str, range(0, 16, 2)), "expert"]
    assert [line.split()[0] for line in lines[4:10]] == list("012345")
    assert all(len(line.split()[1]) == 32 and set(line.split()[1]) <= SHADES for line in lines[4:10])
    assert all(shade in lines[10] for shade in SHADES)
    assert lines[11].split() == ["layer", "expert", "activations", "share", "prompt", "generated", "now/s"]
    shown = [tuple(map(int, line.split()[:3])) for line in lines[12:15]]
    assert shown == [(row["layer_id"], row["expert_id"], row["activation_count"]) for row in answer["top_experts"]]
    assert all(float(line.split()[-1].replace(",", "")) > 0 for line in lines[12:15])


def test_the_statistics_are_watched_until_interrupted(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    tokens: list[int] = []

    def sleep(seconds: float) -> None:
        tokens.append(httpx.get(url + "/expert_stats", timeout=60).json()["summary"]["total_tokens"])
        if len(tokens) == 2:
            raise KeyboardInterrupt
        httpx.post(url + "/generate", json={"prompt": "The sea", "max_new_tokens": 2}, timeout=60).raise_for_status()

    monkeypatch.setattr("amalgam.cli.console.out", terminal)
    monkeypatch.setattr("amalgam.cli.experts.time", SimpleNamespace(sleep=sleep))
    code, _, err = run(capsys, "--url", url, "--watch", "--minutes", "5")
    assert code == 130 and "Traceback" not in err
    assert tokens[1] > tokens[0]
    shown = terminal.file.getvalue()
    for count in tokens:
        assert f" {count} tokens" in shown
    assert "in the last 5 minutes" in shown and "layer  expert  activations" in shown


def test_watching_waits_while_the_server_restarts(
    statistics: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unwell = [(503, b'{"error": {"message": "The model is \\u001b[31mloading"}}'), (200, b"<html>"), (500, b""), None]
    answers: list[tuple[int, bytes] | None] = []
    good = (200, json.dumps(statistics).encode())
    for answer in unwell:
        answers += [good, answer, answer]
    answers += [good]

    class Restarting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if (answer := answers.pop(0)) is None:
                self.close_connection = True
                return
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Restarting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    terminal = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    screens: list[str] = []

    def sleep(seconds: float) -> None:
        screens.append(terminal.file.getvalue()[sum(map(len, screens)) :])
        if not answers:
            raise KeyboardInterrupt

    monkeypatch.setattr("amalgam.cli.console.out", terminal)
    monkeypatch.setattr("amalgam.cli.experts.time", SimpleNamespace(sleep=sleep))
    code, _, err = run(capsys, "--url", f"http://127.0.0.1:{server.server_port}", "--watch")
    server.shutdown()
    server.server_close()
    assert code == 130 and "Traceback" not in err
    assert len(screens) == 13
    for index, shown in enumerate(screens):
        assert ("Waiting for the server" in shown) == (index % 3 != 0)
        assert "layer  expert  activations" in shown and "\x1b[31m" not in shown


def test_a_saved_set_is_what_the_server_has_counted(url: str, saved: Path) -> None:
    item = load(saved)
    assert (
        item.total.counts.sum() == httpx.get(url + "/expert_stats", timeout=60).json()["summary"]["total_activations"]
    )
    assert list(item.labels) == ["en", "zh"]


def test_files_and_a_live_server_are_compared(url: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mean(first: str, second: str) -> Any:
        code, out, _ = run(capsys, "--url", url, "--compare", first, second, "--json")
        assert code == 0
        return json.loads(out)["jensen_shannon"]["mean"]

    assert mean(str(saved), str(saved)) == 0
    assert mean(str(saved), "all") == mean("all", str(saved)) == 0
    assert mean(str(saved), "minutes:60") == 0
    assert mean(str(saved), "label:zh") == pytest.approx(mean("all", "label:zh")) and mean("all", "label:zh") > 0.02
    code, out, _ = run(capsys, "--url", url, "--compare", str(saved), "label:en")
    assert code == 0 and "Jensen-Shannon divergence on average" in out


def test_saved_sets_are_merged(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--merge", str(saved), "--merge", str(saved), "--save", str(tmp_path / "both.npz"))
    assert code == 0 and "both.npz" in err and (tmp_path / "both.npz").read_bytes().startswith(b"PK")
    np.testing.assert_array_equal(load(tmp_path / "both.npz").total.counts, 2 * load(saved).total.counts)


def test_what_the_server_refuses_is_said_in_words(url: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--top-k", "100"], "top_k is 100. Allowed: an integer from 1 to 96"),
        (["--minutes", "-1"], "minutes"),
        (["--compare", "all", "label:nobody"], "label is 'nobody', which no request has had"),
        (["--compare", str(saved), "minutes:soon"], "minutes"),
    ):
        code, out, err = run(capsys, "--url", url, *arguments)
        assert (code, out) == (2, "")
        assert message in err and "{" not in err and "Traceback" not in err


class _Foreign(BaseHTTPRequestHandler):
    """Some other server."""

    def do_POST(self) -> None:
        self.send_response(404 if self.path.startswith("/experts/compare") else 200)
        self.end_headers()
        self.wfile.write(b"<html>\x1b[31mhello</html>")

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def test_another_kind_of_server_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Foreign)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        code, _, err = run(capsys, "--url", address)
        assert code == 6 and "no amalgam server" in err
        code, _, err = run(capsys, "--url", address, "--save", str(tmp_path / "a.npz"))
        assert code == 6 and "no amalgam server" in err and not (tmp_path / "a.npz").exists()
        code, _, err = run(capsys, "--url", address, "--compare", "all", "minutes:1")
        assert code == 2 and "404" in err and "\x1b" not in err
    finally:
        server.shutdown()
        server.server_close()


def test_the_server_s_address_is_that_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for host, expected in (("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9")):
        code, _, err = run(capsys, "--host", host, "--port", "9")
        assert code == 6 and f"No server answers at {expected} " in err


MODEL = ["--model", str(DEMO)]
MISTAKES = {
    "watching as JSON": (["--watch", "--json"], "--watch and --json are given together"),
    "one layer as JSON": (["--prompt", "x", *MODEL, "--layer", "1", "--json"], "--layer and --json are given together"),
    "watching without a screen": (["--watch"], "--watch needs a terminal"),
    "watching a prompt": (["--watch", "--prompt", "x", *MODEL], "--watch is given together with --prompt"),
    "a chat without a prompt": (["--chat"], "--chat is given alone. It goes with --prompt"),
    "a layer without a prompt": (["--layer", "1"], "--layer is given alone"),
    "new tokens without a prompt": (["--max-new-tokens", "3"], "--max-new-tokens is given alone"),
    "saving a comparison": (["--compare", "a.npz", "b.npz", "--save", "c.npz"], "--compare"),
    "a window of a saved set": (["--save", "c.npz", "--minutes", "5"], "--minutes is given together with --save"),
    "a saved set as JSON": (["--save", "c.npz", "--json"], "--json is given together with --save"),
    "a merger as JSON": (["--merge", "a.npz", "--save", "c.npz", "--json"], "--json is given together with --merge"),
    "an address for a prompt": (["--prompt", "x", "--url", "http://a", *MODEL], "--url is given together"),
    "an address that is none": (["--url", "localhost:8080"], "'localhost:8080' is no address of a server"),
    "an address without a host": (["--url", "http://"], "'http://' is no address of a server"),
    "an address that is cut off": (["--url", "http://[::1"], "'http://[::1' is no address of a server"),
    "an address with a word for a port": (["--url", "http://a:b"], "'http://a:b' is no address of a server"),
    "a layer that does not exist": (["--prompt", "x", *MODEL, "--layer", "77"], "--layer is 77. Layers with experts"),
    "a prompt for no model": (["--prompt", ""], "--model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_combinations_without_effect_are_refused(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_nothing(*_: Any) -> None:
        raise AssertionError("it is refused before the model is loaded")

    monkeypatch.setattr("amalgam.runtime.opening.open_deployment", open_nothing)
    arguments, message = MISTAKES[case]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("c.npz").exists()


def test_a_file_that_is_not_there_is_called_so(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--compare", str(saved), "typo.npz")
    assert code == 3 and "Cannot read 'typo.npz': No such file" in err
    code, _, err = run(capsys, "--compare", str(saved), "saved:x")
    assert code == 2 and "'saved:x' is a set of the server" in err


@pytest.mark.parametrize("target", ["", "folder"])
def test_a_place_that_takes_no_file_is_named(
    saved: Path, target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    Path("folder").mkdir()
    code, _, err = run(capsys, "--merge", str(saved), "--save", target)
    assert code == 3 and f"{target or '.'} cannot be written" in err


def test_sets_of_different_models_are_not_compared(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.npz"
    other.write_bytes(to_bytes(make_tracker(3, 8).saved_set()))
    code, _, err = run(capsys, "--compare", str(saved), str(other))
    assert code == 2 and "6 layers of 16 experts and 3 layers of 8 experts" in err


def test_tokens_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--prompt", "It's don't\n\\n ☃", *MODEL, "--layer", "0")
    assert code == 0
    shown = "".join(line.split("\t")[2] for line in out.splitlines()[1:])
    assert shown == r"It's␣don't\n\\n␣\xe2\x98\x83"
    assert visible(b"\x1b[31m\t") == r"\x1b[31m\t"
    assert visible("明月".encode()) == "明月"


def make_tracker(num_layers: int, num_experts: int, top_k: int = 2, num_tokens: int = 400) -> ExpertTracker:
    """Tokens of two labels that like some experts better."""
    from amalgam.config.statistics import StatisticsSettings

    tracker, rng = ExpertTracker(range(num_layers), num_experts, top_k, StatisticsSettings()), np.random.default_rng(0)
    for request_id, label in enumerate(("en", "宋词")):
        tracker.admit(request_id, label, 0)
        tracker.begin_step([TokenSpan(request_id, 0, num_tokens, 0, num_tokens, label=label)])
        for layer_id in range(num_layers):
            liking = rng.gamma(0.6, 1.0, num_experts)
            scores = rng.gumbel(size=(num_tokens, num_experts)) + np.log(liking)
            expert_ids = np.argsort(-scores, axis=-1)[:, :top_k].copy()
            tracker.observe(layer_id, torch.from_numpy(expert_ids), torch.ones(num_tokens, top_k))
        tracker.end_step()
    return tracker


@pytest.fixture(scope="module", params=[(6, 16, 4), (94, 128, 8), (3, 512, 2)], ids=["small", "large", "wide"])
def statistics(request: pytest.FixtureRequest) -> dict[str, Any]:
    return build_overview(make_tracker(*request.param), None).as_json()


def printed(view: Any, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(view)
    return console.file.getvalue().splitlines()


def heatmap_rows(lines: list[str]) -> list[str]:
    cells = [part for line in lines for part in line.split()[1:2]]
    return [text for text in cells if len(text) > 8 and set(text) <= SHADES]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (200, 60)])
def test_everything_fits_one_screen(statistics: dict[str, Any], width: int, height: int) -> None:
    lines = printed(screen(statistics, width, height), width, height)
    assert len(lines) <= height
    rows = heatmap_rows(lines)
    assert len(rows) >= min(statistics["summary"]["total_layers"], height // 4)
    assert len({len(row) for row in rows}) == 1
    busiest = statistics["top_experts"][0]
    [first] = [index for index, line in enumerate(lines) if "activations  share" in line]
    assert f"{busiest['activation_count']}" in lines[first + 1]
    assert any("•" in line for line in lines)
    assert any("· never  ░ ≤½  ▒ even  ▓ 2×  █ ≥4×" in line for line in lines)


@pytest.mark.parametrize("width", [30, 40, 50, 60, 80])
def test_no_figure_is_cut(statistics: dict[str, Any], width: int) -> None:
    """A narrow screen has fewer columns: what is left of a figure would read as another one."""
    keys = {"layer": "layer_id", "expert": "expert_id", "activations": "activation_count", "prompt": "prompt_count"}
    for view in (screen(statistics, width, 100), page(statistics, width, 100)):
        lines = printed(view, width, 100)
        text = "\n".join(lines)
        for total in ("total_activations", "total_tokens"):
            assert f"{statistics['summary'][total]:,}" in text
        [head] = [index for index, line in enumerate(lines) if re.match(r" *layer +expert +activations", line)]
        names = lines[head].split()
        for row, line in zip(statistics["top_experts"][:3], lines[head + 1 : head + 4], strict=True):
            shown = dict(zip(names, line.split(), strict=True))
            assert {name: shown[name] for name in keys if name in shown} == {
                name: str(row[key]) for name, key in keys.items() if name in names
            }
        assert ("prompt" in names) == (width == 80)
        ids = next(line for line in lines if line.strip().startswith("layer ")).split()[1:]
        assert {int(word) for word in ids if word != "expert"} <= set(range(statistics["summary"]["experts_per_layer"]))
        assert not re.search(r"\d…", text)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
def test_a_page_has_the_hints_at_its_end_and_lines_that_do_not_wrap(
    statistics: dict[str, Any], width: int, height: int
) -> None:
    lines = printed(page(statistics, width, height), width, height)
    rows = heatmap_rows(lines)
    assert len(rows) <= height
    assert len(rows) == len([line for line in lines if SHADES & set(line)]) - 1  # and the legend: no row is wrapped
    hints = "".join(statistics["hints"][-1]["text"].split())
    assert "".join("".join(lines[-3:]).split()).endswith(hints)


def test_a_cell_for_several_shows_the_busiest_and_says_so() -> None:
    tracker = make_tracker(94, 128, 8)
    statistics = build_overview(tracker, None).as_json()
    lines = printed(page(statistics, 80, 24), 80, 24)
    rows = heatmap_rows(lines)
    assert len(rows) == 19 and len(rows[0]) == 64
    [legend] = [line for line in lines if "· never" in line]
    assert legend.endswith("cell: busiest of 5 layers × 2 experts")
    counts = tracker.snapshot().tally.counts.sum(axis=0)
    share = counts / counts.sum(axis=-1, keepdims=True) * 128
    expected = np.clip(np.rint(np.log2(share[5:10, 2:4].max())) + 2, 1, 4)
    assert rows[1][1] == "·░▒▓█"[int(expected)]
    whole = heatmap_rows(printed(page(statistics, 200, None), 200, 24))
    assert len(whole) == 94 and len(whole[0]) == 128
