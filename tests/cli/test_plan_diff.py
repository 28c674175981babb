"""`amalgam plan --diff`: configurations and manifests beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_demo_config

from amalgam.cli import main

UP = "model.layers.2.mlp.experts.5.up_proj.weight"
DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def plans(derived: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The demo's configuration, and one with two weights from other sources."""
    folder = tmp_path_factory.mktemp("plans")
    before = write_demo_config(folder, derived)
    text = before.read_text()
    after = folder / "after.yaml"
    after.write_text(
        text.replace("weight_mapping:\n", f'weight_mapping:\n      "{UP}": fp8\n      "{DOWN}": int4\n', 1)
    )
    assert after.read_text() != text
    return str(before), str(after)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_weights_that_differ_are_told_with_their_sizes(
    plans: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--diff", *plans, "--json")
    assert code == 0
    found = json.loads(out)
    manifests = []
    for plan in plans:
        assert main(["plan", "--config", plan, "--manifest"]) == 0
        manifests.append(json.loads(capsys.readouterr().out))
    assert [found["fingerprint_before"], found["fingerprint_after"]] == [each["fingerprint"] for each in manifests]
    by_name = [{weight["name"]: weight for weight in each["weights"]} for each in manifests]
    expected = {
        name: (old["source"], new["source"], old["format"], new["format"])
        for name, old in by_name[0].items()
        if (old["source"], old["format"]) != ((new := by_name[1][name])["source"], new["format"])
    }
    assert expected and set(expected) <= {UP, DOWN}
    told = {
        weight["name"]: tuple(weight[f"{what}_{when}"] for what in ("source", "format") for when in ("before", "after"))
        for weight in found["changed"]
    }
    assert told == expected
    for number, when in enumerate(("before", "after")):
        sizes = {name: sum(part["nbytes"] for part in weight["parts"]) for name, weight in by_name[number].items()}
        assert found[f"bytes_{when}"] == sum(sizes.values())
        assert all(weight[f"bytes_{when}"] == sizes[weight["name"]] for weight in found["changed"])
    assert (found["only_before"], found["only_after"], found["num_weights"]) == ([], [], len(by_name[1]))

    kept = [str(tmp_path / f"{number}.json") for number in range(2)]
    for path, document in zip(kept, manifests, strict=True):
        Path(path).write_text(json.dumps(document))
    code, out, _ = run(capsys, "--diff", kept[0], kept[1], "--json")
    assert json.loads(out) == found | {"before": kept[0], "after": kept[1]}
    code, out, _ = run(capsys, "--diff", kept[0], kept[0])
    assert code == 0 and f"0 of {len(by_name[0]):,} weights differ" in out
    code, out, _ = run(capsys, "--diff", *kept, "--all")
    assert [line.split("\t")[0] for line in out.splitlines()[1:-1]] == list(expected)
    code, out, _ = run(capsys, "--diff", *kept)
    assert sum(int(line.split("\t")[0]) for line in out.splitlines()[1:-1]) == len(expected)


@pytest.mark.parametrize(
    "more", [["--explain", UP], ["--manifest"], ["--budget", "4.5bpw"], ["--config", "x"], ["--model", "models/demo"]]
)
def test_what_has_no_effect_beside_it_is_refused(
    plans: tuple[str, str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = [plans[0] if word == "x" else word for word in more]
    code, _, err = run(capsys, "--diff", *plans, *more)
    assert code == 2 and "beside --diff" in err and more[0].strip("-") in err


def test_what_is_no_plan_is_refused(plans: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(name: Any, nbytes: Any) -> dict[str, Any]:
        part = {"tensor": "t", "file": "f", "offset": 0, "nbytes": nbytes}
        return {"name": name, "source": "s", "format": "f", "parts": [part]}

    def document(*weights: Any) -> str:
        return json.dumps({"fingerprint": "a", "weights": weights})

    for text, named in (
        ("{}", "'weights'"), ("[1]", ""), ("nonsense", ""), (document("a"), ""), (document(plan(1, 2)), "name is 1"),
        (document(plan("a", "2")), "nbytes is '2'"), (document(plan("a", -5)), "nbytes is -5"),
        (document(plan("a", None)), "nbytes is None"), (document(plan("a", 1), plan("a", 2)), "'a'"),
    ):  # fmt: skip
        file = tmp_path / "other.json"
        file.write_text(text)
        code, _, err = run(capsys, "--diff", str(file), plans[0])
        assert code == 2 and "other.json" in err and named in err
    assert run(capsys, "--diff", str(tmp_path / "absent.yaml"), plans[0])[0] == 2
