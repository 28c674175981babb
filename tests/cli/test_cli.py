"""The verbs as a user types them: exit codes, messages, tables and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.conftest import DEMO, ROOT

from amalgam.cli import VERBS, main, serve
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError
from amalgam.experts.saved.files import load
from amalgam.kernels.backends.cpu import extension
from amalgam.llm import LLM

EXPERT = "model.layers.0.mlp.experts.0.down_proj.weight"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_program(program: str, *arguments: str) -> str:
    """What a program prints that an interpreter of its own runs."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert f" {verb} " in out


def test_help_shows_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    assert "..." not in out.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("typo", "meant"), [("serv", "'serve'"), ("quantise", "'quantize'"), ("deploy", "'deploy ray'")]
)
def test_a_misspelt_verb_names_the_one_that_was_meant(
    typo: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, typo)
    assert code == 2
    assert meant in err


def test_help_names_the_values_that_a_setting_takes(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "serve", "--help")
    assert "none|ngram|self|draft" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *verb.split(), "--help")
    assert code == 0
    assert f"amalgam {verb}" in out


@pytest.mark.parametrize(
    ("arguments", "place", "goes_on"),
    [
        (["plan", "--budget", "4bpw", "--text", "README.md"], "amalgam.tools.plan.make_plan", True),
        (["evaluate", "--sensitivity", "--text", "README.md"], "amalgam.tools.plan.measure_sensitivities", True),
        (["evaluate", "--text", "README.md"], "amalgam.tools.evaluate.evaluate", False),
        (["prune", "--experts", "1", "--text", "README.md"], "amalgam.tools.pruning.running.prune", True),
        (["distill", "OUT", "--text", "README.md"], "amalgam.tools.distill.distill", True),
        (["export", "OUT", "--to", "vllm"], "amalgam.tools.export.exporting.export_model", True),
        (["estimate"], "amalgam.tools.estimate.estimate", False),
    ],
)
def test_who_interrupts_a_verb_is_told_whether_it_goes_on(
    arguments: list[str],
    place: str,
    goes_on: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    folder = str(tmp_path / "out")
    code, _, err = run(capsys, *(folder if word == "OUT" else word for word in arguments), "--model", str(DEMO))
    assert code == 130
    assert err == f"Interrupted.{' The same command goes on with what is done.' if goes_on else ''}\n"


def test_a_verb_imports_no_torch_before_it_needs_it() -> None:
    program = "import sys; from amalgam.cli import main; main(['serve', '--help']); print('torch' in sys.modules)"
    assert run_program(program).endswith("False")


@pytest.mark.skipif(not extension.is_available(), reason="the packed cache needs the native kernels")
def test_a_start_from_the_packed_cache_imports_what_it_uses(tmp_path: Path) -> None:
    program = """
import sys
import amalgam.cli.serve, amalgam.server.app
from amalgam.llm import LLM
LLM(model=sys.argv[1], settings={"inference.packed_cache": sys.argv[2]}).close()
print(*sys.modules.keys() & {"transformers", "huggingface_hub", "rich", "plotly", "jinja2", "torch._dynamo", "sympy"})
"""
    LLM(model=DEMO, settings={"inference.packed_cache": str(tmp_path)}).close()
    assert run_program(program, str(DEMO), str(tmp_path)) == ""


def test_no_library_waits_for_the_one_of_torch() -> None:
    program = """
import sys
from importlib.machinery import ExtensionFileLoader
from amalgam.cli import serve

def libraries():
    return {n for n, m in sys.modules.items() if isinstance(getattr(m, "__loader__", None), ExtensionFileLoader)}

serve.begin_to_load_torch()
before = libraries()
import amalgam.server.app
assert "torch" not in sys.modules
print(*libraries() - before)
"""
    assert run_program(program) == "", "import it before, in _begin_to_load_torch"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("is_there", [True, False])
def test_loading_torch_ahead_may_fail(is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py")) if is_there else None
    monkeypatch.setattr("amalgam.cli.serve.find_spec", lambda name: spec)
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def recorded(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    serve.begin_to_load_torch()
    for thread in started:
        thread.join()
    assert len(started) == is_there


def test_a_watched_configuration_is_read_again_with_all_flags(
    demo_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each look would tell of settings that nobody has changed."""
    seen: list[tuple[Settings, Settings]] = []

    class Watch:
        def __init__(self, path: Path, read: Callable[[], Settings], settings: Settings, change: object) -> None:
            seen.append((read(), settings))

        def start(self, seconds: float) -> None:
            assert seconds == 5

    def run_server(settings: Settings, load: Callable[[], object], stopping: threading.Event) -> int:
        load()
        return 0

    monkeypatch.setattr("amalgam.runtime.config_watch.ConfigWatch", Watch)
    monkeypatch.setattr("amalgam.server.app.run", run_server)
    monkeypatch.setattr(
        "amalgam.runtime.opening.open_deployment",
        lambda settings, _: SimpleNamespace(change=None, tokenizer=None, settings=settings),
    )
    monkeypatch.setattr("amalgam.text.grammar.prepare_grammars", lambda _: None)
    monkeypatch.setattr(serve, "begin_to_load_torch", lambda: None)
    monkeypatch.setattr(serve.gc, "freeze", lambda: None)
    flags = ["--autoplan", "--weights.watch_seconds", "5", "--weights.look_ahead", "false", "--server.port", "1"]
    assert main(["serve", "--config", str(demo_config), *flags]) == 0
    [(again, first)] = seen
    assert again == first and first.planning.autoplan.enabled


def test_generate_answers_in_json(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", str(demo_config), "--max-new-tokens", "8", "--seed", "1", "--json")
    code, out, _ = run(capsys, "generate", "The old man", "明月", *arguments)
    assert code == 0
    answers = json.loads(out)
    assert [answer["prompt"] for answer in answers] == ["The old man", "明月"]
    assert all(answer["generated_text"] and answer["usage"]["num_new_tokens"] <= 8 for answer in answers)


def test_settings_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "x", "--model", str(DEMO), "--inference.dtype", "float8")
    assert code == 2
    assert "inference.dtype" in err
    assert "'float8'" in err


def test_plan_explains_which_rule_won(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--config", str(demo_config), "--explain", EXPERT)
    assert code == 0
    assert "exact name beats the pattern" in " ".join(out.split())
    code, out, _ = run(capsys, "plan", "--config", str(demo_config), "--json", "--explain", EXPERT)
    explanation = json.loads(out)
    assert explanation["source"] == "base"
    assert [rule["source"] for rule in explanation["matching_rules"]] == ["base", "fp8", "int4"]


def test_plan_lists_every_weight(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--config", str(demo_config), "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert len(rows) == 344
    assert rows[EXPERT]["format"] == "bf16"
    assert rows[EXPERT.replace("experts.0", "experts.1")]["format"] == "fp8"
    assert rows[EXPERT.replace("experts.0", "experts.9")]["format"] == "int4"
    code, out, _ = run(capsys, "plan", "--config", str(demo_config))
    assert code == 0
    assert "344" in out


def test_map_and_source_flags(derived: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", str(DEMO), "--source", f"small={derived / 'int4'}", "--map", "*.experts.*=small")
    code, out, _ = run(capsys, "plan", *flags, "--json")
    assert code == 0
    assert sum(row["source"] == "small" for row in json.loads(out)) == 288


def test_quantize_reports_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_folder = tmp_path / "int8"
    code, out, _ = run(capsys, "quantize", str(DEMO), str(out_folder), "--format", "int8", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["roles"]["expert"]["weights"] == 288
    assert 0 < report["roles"]["expert"]["relative_error"] < 0.02
    assert report["bytes_after"] < 0.6 * report["bytes_before"]
    assert sorted(path.name for path in out_folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "MODEL", "MODEL", "--format", "int4"),
        ("export", "MODEL", "--to", "vllm", "--model", "MODEL"),
        ("prune", "--model", "MODEL", "--out", "MODEL", "--experts", "25%", "--text", "none.txt"),
        ("distill", "MODEL", "--student", "MODEL", "--text", "none.txt"),
        ("demo", "MODEL"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_read_is_never_written_over_nor_named_as_what_can_go(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_text("no checkpoint: whoever opened it would say that")
    code, _, err = run(capsys, *(str(tmp_path) if argument == "MODEL" else argument for argument in arguments))
    assert code == CheckpointError.exit_code
    assert f"{tmp_path} " in err and "remove" not in err.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_bench_ends_with_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--prompts", "16", "--batches", "1,2", "--num-tokens", "2", "--repeats", "1")
    code, out, _ = run(capsys, "bench", "--model", str(DEMO), *sizes)
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    assert out.splitlines()[1].split("\t")[0] == "measurement"
    names = [item["name"] for item in report["measurements"]]
    assert names == ["load", "prompt of 16", "decode 1 sequence", "decode 2 sequences", "peak memory"]
    assert all(item["value"] > 0 for item in report["measurements"])
    assert report["hardware"]["cores"]


def test_a_prompt_is_analysed_token_by_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    english, verse, both = (tmp_path / f"{name}.npz" for name in ("english", "verse", "both"))
    text = "The old man looked at the sea"
    code, out, _ = run(capsys, "experts", "--prompt", text, "--model", str(DEMO), "--json", "--save", str(english))
    assert code == 0
    answer = json.loads(out)
    assert "".join(token["text"] for token in answer["tokens"]) == text
    assert answer["layer_ids"] == list(range(6))
    assert [len(layer) for token in answer["experts"] for layer in token] == [4] * 6 * len(answer["tokens"])
    code, out, _ = run(
        capsys, "experts", "--prompt", "明月几时有", "--model", str(DEMO), "--layer", "2", "--save", str(verse)
    )
    assert code == 0
    assert "layer 2" in out and "layer 3" not in out
    code, out, _ = run(capsys, "experts", "--compare", str(english), str(verse), "--json")
    assert code == 0
    assert json.loads(out)["jensen_shannon"]["mean"] > 0.1
    code, out, _ = run(capsys, "experts", "--compare", str(english), str(verse))
    assert code == 0 and "Jensen-Shannon" in out
    code, _, _ = run(capsys, "experts", "--merge", str(english), "--merge", str(verse), "--save", str(both))
    assert code == 0
    sets = [load(path) for path in (english, verse, both)]
    assert sets[2].total.counts.sum() == sets[0].total.counts.sum() + sets[1].total.counts.sum()


BAD = {
    "no model": (["plan"], 2, "--config"),
    "no such file": (["plan", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    "no such folder": (["plan", "--model", "/nowhere/at/all"], 3, "/nowhere/at/all"),
    "a source nobody declared": (["plan", "--model", str(DEMO), "--map", "*=int3"], 2, "int3"),
    "a rule that matches nothing": (
        ["plan", "--model", str(DEMO), "--source", f"x={DEMO}", "--map", "model.layers.6.*=x"],
        4,
        "model.layers.6.*",
    ),
    "a rule without a source": (["plan", "--model", str(DEMO), "--map", "abc"], 2, "'abc'"),
    "an unknown option": (["plan", "--modell", str(DEMO)], 2, "--modell"),
    "an unknown verb": (["plann"], 2, "plann"),
    "an unknown weight": (["plan", "--model", str(DEMO), "--explain", "model.norm.wight"], 4, "model.norm.weight"),
    "an unknown format": (["quantize", str(DEMO), "/tmp/never", "--format", "int5"], 3, "int5"),
    "a group that does not divide": (
        ["quantize", str(DEMO), "/tmp/never", "--format", "int4", "--group-size", "48"],
        2,
        "48",
    ),
    "a temperature out of range": (["generate", "x", "--model", str(DEMO), "--temperature", "-1"], 2, "-1"),
    "an unknown shape": (["bench", "--shape", "XXL"], 2, "XXL"),
    "nothing to measure": (["bench"], 2, "--shape"),
    "weights of no shape": (["bench", "--model", str(DEMO), "--weights", "int4"], 2, "--shape"),
    "a reference that is not there": (
        ["generate", "x", "--model", str(DEMO), "--statistics.reference", "nowhere.npz"],
        2,
        "statistics.reference is 'nowhere.npz'",
    ),
    "no server": (["experts", "--url", "http://127.0.0.1:9"], 6, "127.0.0.1:9"),
    "a prompt for no model": (["experts", "--prompt", "x"], 2, "--model"),
    "a layer that does not exist": (["experts", "--prompt", "x", "--model", str(DEMO), "--layer", "9"], 2, "9"),
    "two analyses at once": (["experts", "--prompt", "x", "--merge", "a.npz"], 2, "--merge"),
    "a merge to nowhere": (["experts", "--merge", "a.npz"], 2, "--save"),
    "a saved set that is none": (["experts", "--merge", "README.md", "--save", "/tmp/never"], 3, "README.md"),
    "nothing to compare with": (
        ["experts", "--compare", "all", "saved:x", "--url", "http://127.0.0.1:9"],
        6,
        "127.0.0.1:9",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_a_message_and_an_exit_code(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected, message = BAD[case]
    code, _, err = run(capsys, *arguments)
    assert code == expected
    assert message in err
    assert "Traceback" not in err
    assert not Path("/tmp/never").exists()
