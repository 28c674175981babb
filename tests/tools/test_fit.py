"""What is recommended on machines of all sizes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from amalgam.base.machine import Machine
from amalgam.cli import main
from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.runner import choose_num_blocks
from amalgam.models.decoder import Decoder
from amalgam.models.registry import all_families
from amalgam.models.weights import WeightVersion
from amalgam.planning.pace import Sample, expected_step
from amalgam.runtime.speculation import draft_bytes
from amalgam.tools.fit import (
    SAFE_SHARE,
    Candidate,
    Fit,
    FitReport,
    Hardware,
    Needs,
    Wanted,
    fit_candidate,
    fit_model,
    fit_on,
    recommend,
)
from amalgam.tools.fit_split import Parts
from tests.conftest import DEMO
from tests.models.harness import Runner
from tests.models.tiny import save_tiny

GB = 10**9
NEEDS = Needs(fixed=GB, per_sequence=0, kv_per_block=GB // 100, block_size=16)  # 1 GB for 1,600 tokens


def hardware(memory: int, available: int | None = None) -> Hardware:
    available = memory if available is None else available
    machine = Machine("Some Xeon", 8, 1, 8, None, ("avx2", "amx_tile"), memory, None, available)
    return Hardware(machine, (), "cpu", memory, available)


def candidate(name: str, bits: float, speed: float | None = None, command: str = "") -> Candidate:
    """A model of eight billion weights."""
    return Candidate(name, command, f"serve {name}", bits, int(bits * GB), speed)


def fits(memory: int, wanted: Wanted, *candidates: Candidate) -> tuple[list[Fit], Hardware]:
    found = hardware(memory)
    return [fit_candidate(each, NEEDS, found.room_bytes, wanted) for each in candidates], found


ALL = (
    candidate("base", 16, 4),
    candidate("int8", 8, 9, "quantize int8"),
    candidate("fp8", 8.1, 6, "quantize fp8"),
    candidate("int4", 4.2, 15, "quantize int4"),
)


@pytest.mark.parametrize(
    ("memory", "wanted", "name", "context", "sequences"),
    [
        (64, Wanted(3200, 4), "base", 3200, 4),
        (24, Wanted(3200, 4), "base", 3200, 1),  # 20.4 GB: 17 and two for each sequence
        (20, Wanted(3200, 4), "int8", 3200, 4),  # base is too wide, int8 is faster than fp8
        (14, Wanted(3200, 4), "int8", 3200, 1),
        (10, Wanted(3200, 4), "int4", 3200, 1),
        (7, Wanted(3200, 4), "int4", 1200, 1),  # 5.95 GB less 5.2
        (64, Wanted(3200, 4, 8.0), "int8", 3200, 4),
        (64, Wanted(3200, 4, 12.0), "int4", 3200, 4),
        (64, Wanted(3200, 4, 99.0), "base", 3200, 4),  # nothing is so fast
    ],
)
def test_the_widest_that_fits_and_is_fast_enough(
    memory: int, wanted: Wanted, name: str, context: int, sequences: int
) -> None:
    found, machine = fits(memory * GB, wanted, *ALL)
    best = recommend(found, machine, wanted)
    assert best is not None
    assert (best.fit.candidate.name, best.fit.context, best.fit.sequences) == (name, context, sequences)
    assert best.fit.total_bytes <= machine.room_bytes and best.commands[-1].startswith(f"serve {name}")
    assert (len(best.commands) == 2) == (name != "base")


def test_reasons_name_what_is_missing_and_what_would_be_faster() -> None:
    wanted = Wanted(3200, 4)
    found, machine = fits(14 * GB, wanted, *ALL)
    best = recommend(found, machine, wanted)
    assert best is not None
    reasons = "\n".join(best.reasons)
    lacking = found[0]
    assert not lacking.fits and lacking.spare_bytes == pytest.approx(11.9 * GB - 16 * GB - GB - 0.32 * GB)
    assert f"{-lacking.spare_bytes / GB:.2f} GB" in reasons and "base" in reasons
    assert "1 of 4 sequences" in reasons and "int4 would be 1.7 times" in reasons


def test_the_whole_context_goes_before_bits_where_nothing_is_fast_enough() -> None:
    wanted = Wanted(3200, 1, 99.0)
    found, machine = fits(21 * GB, wanted, candidate("base", 16, 4), candidate("int4", 4.2, 15))  # 17.85 GB
    assert [fit.context for fit in found] == [1360, 3200]
    best = recommend(found, machine, wanted)
    assert best is not None and best.fit.candidate.name == "int4"
    reasons = "\n".join(best.reasons)
    assert "1,360 tokens of context only" in reasons and "Nothing that fits makes 99 tok/s" in reasons


def test_a_context_beyond_the_models_positions_is_said() -> None:
    asked = fit_model(settings_of(DEMO), Wanted(10**6, 1), measures=False, hardware=lambda settings: hardware(64 * GB))
    assert asked.recommendation is not None
    assert asked.recommendation.fit.context == asked.wanted.context < 10**6
    assert "1,000,000 tokens" in asked.recommendation.reasons[-1]
    assert f"{asked.wanted.context:,} positions" in asked.recommendation.reasons[-1]


def test_nothing_fits() -> None:
    found, machine = fits(4 * GB, Wanted(3200, 4), *ALL)
    assert recommend(found, machine, Wanted(3200, 4)) is None
    assert all(fit.spare_bytes < 0 and not fit.sequences for fit in found)


def test_without_speeds_what_is_there_is_preferred() -> None:
    wanted = Wanted(3200, 1)
    found, machine = fits(64 * GB, wanted, candidate("int8", 8, None, "quantize int8"), candidate("mine", 7.8))
    best = recommend(found, machine, wanted)
    assert best is not None and best.fit.candidate.name == "mine"


def test_the_command_gives_the_caches_the_room_that_was_counted() -> None:
    wanted = Wanted(3200, 4)
    needs = replace(NEEDS, states=GB // 10)
    found = hardware(24 * GB)
    fit = fit_candidate(candidate("base", 16), needs, found.room_bytes, wanted)
    assert (fit.sequences, fit.kv_bytes, fit.state_bytes) == (1, 2 * GB, GB // 10)
    assert fit.total_bytes == 16 * GB + GB + 2 * GB + GB // 10
    best = recommend([fit], found, wanted)
    assert best is not None
    assert f"--engine.kv_cache_bytes {2 * GB}" in best.commands[0]
    assert f"--engine.state_cache_bytes {GB // 10}" in best.commands[0]
    guessing = replace(NEEDS, draft_per_block=GB // 100)
    fit = fit_candidate(candidate("base", 16), guessing, hardware(32 * GB).room_bytes, wanted)
    assert (fit.sequences, fit.kv_bytes, fit.total_bytes) == (2, 2 * 2 * GB, 16 * GB + GB + 2 * 2 * 2 * GB)
    none = fit_candidate(candidate("base", 16), replace(NEEDS, kv_per_block=0), found.room_bytes, wanted)
    assert (none.context, none.kv_bytes) == (3200, 0)
    without = recommend([none], found, wanted)
    assert without is not None and "cache_bytes" not in without.commands[0]


def test_others_memory_is_not_taken() -> None:
    found = hardware(100 * GB, 40 * GB)
    assert found.room_bytes == pytest.approx(40 * GB - (1 - SAFE_SHARE) * 100 * GB)
    assert hardware(100 * GB, GB).room_bytes == 0


def settings_of(small: Path, **mixed: str) -> Settings:
    paths = {f"{name}_path": path for name, path in mixed.items()}
    return build_settings({"model": {"base_path": str(small), "mixed_precision": paths}})


def found_on(memory: int, settings: Settings, *, measures: bool = False) -> FitReport:
    return fit_model(settings, Wanted(256, 2), measures=measures, hardware=lambda settings: hardware(memory))


def test_the_demo_on_machines_of_all_sizes() -> None:
    settings = settings_of(DEMO)
    report = found_on(64 * GB, settings)
    assert [fit.candidate.name for fit in report.fits] == ["base", "int8", "fp8", "int4-g32", "int4-g128"]
    assert report.recommendation is not None and report.recommendation.fit.candidate.name == "base"
    sizes = {fit.candidate.name: fit.total_bytes for fit in report.fits}
    assert sizes["base"] > sizes["int8"] > sizes["int4-g32"] > sizes["int4-g128"]
    between = int((sizes["int4-g32"] + sizes["int8"]) / 2 / SAFE_SHARE)
    narrow = found_on(between, settings).recommendation
    assert narrow is not None and narrow.fit.candidate.name == "int4-g32"
    assert narrow.commands[0].startswith("amalgam quantize ") and "--group-size 32" in narrow.commands[0]
    assert found_on(10**6, settings).recommendation is None


def test_sources_of_a_configuration_are_compared_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    report = found_on(64 * GB, settings_of(DEMO, twin=str(DEMO), lost=str(tmp_path / "none")))
    twin = next(fit for fit in report.fits if fit.candidate.name == "twin")
    assert twin.candidate.bits_per_weight == report.fits[0].candidate.bits_per_weight
    assert f"--source twin={DEMO}" in twin.candidate.serve and "--map" in twin.candidate.serve
    assert set(report.left_out) == {"lost"}


def served(command: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a command that was recommended would serve."""
    given: list[Settings] = []

    def run(settings: Settings, load: object, stopping: object) -> int:
        given.append(settings)
        return 0

    monkeypatch.setattr("amalgam.server.app.run", run)
    name, *arguments = shlex.split(command)
    assert name == "amalgam" and main(arguments) == 0
    return given[0]


MIXED = {"twin_path": str(DEMO), "weight_mapping": {"model.layers.0.*": "twin"}}
FLAGS = ["--inference.dtype", "float32", "--engine.kv_dtype", "int8", "--inference.bf16_coding", "false"]
MAPS = ["--source", f"other={DEMO}", "--map", "model.layers.1.*=other"]


@pytest.mark.parametrize(
    ("file", "arguments", "rules"),
    [
        (None, ["--model", str(DEMO), *FLAGS, *MAPS], ["model.layers.1.*"]),
        ({"model": {"mixed_precision": MIXED}, "engine": {"block_size": 32}}, [], ["model.layers.0.*"]),
        ({"model": {"mixed_precision": MIXED}}, [*FLAGS, *MAPS], ["model.layers.0.*", "model.layers.1.*"]),
        ({"inference": {"dtype": "float32"}}, ["--inference.dtype", "bfloat16", *MAPS], ["model.layers.1.*"]),
    ],
)
def test_printed_commands_serve_what_was_computed(
    file: dict[str, Any] | None,
    arguments: list[str],
    rules: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if file is not None:
        document = file | {"model": {"base_path": str(DEMO), **file.get("model", {})}}
        config = tmp_path / "some model.yaml"
        config.write_text(yaml.safe_dump(document))
        arguments = ["--config", str(config), *arguments]
    monkeypatch.setattr("amalgam.tools.fit.set_threads", lambda engine: None)
    assert main(["fit", *arguments, "--no-measure", "--context", "128", "--sequences", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    asked = served(shlex.join(["amalgam", "serve", *arguments]), monkeypatch)
    commands = {fit["candidate"]["name"]: fit["candidate"]["serve"] for fit in report["fits"]}
    for name, command in commands.items():
        settings = served(command, monkeypatch)
        assert (settings.inference, settings.engine) == (asked.inference, asked.engine), name
        patterns = [rule.pattern for rule in settings.model.mixed_precision.all_rules]
        if name == "as configured":
            assert settings.model == asked.model and patterns == rules
        elif name == "base":
            assert settings.model.base_path == str(DEMO) and not patterns
        elif name in asked.model.mixed_precision.sources:
            assert settings.model.mixed_precision.sources == {name: str(DEMO)} and patterns
    assert "as configured" in commands


def test_what_is_recommended_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    best = found_on(64 * GB, settings_of(DEMO)).recommendation
    assert best is not None
    settings = served(best.commands[-1], monkeypatch)
    monkeypatch.setattr("amalgam.engine.runner.available_bytes", lambda device: 0)
    spec = ModelLoader(settings.model, settings.inference, torch.device("cpu"), 1).spec
    blocks = choose_num_blocks(spec, settings, best.fit.context, torch.device("cpu"), torch.bfloat16)
    assert blocks * settings.engine.block_size == best.fit.sequences * best.fit.context


def test_speed_is_measured_on_a_few_layers() -> None:
    report = found_on(64 * GB, settings_of(DEMO), measures=True)
    assert all(fit.candidate.tokens_per_second for fit in report.fits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma4", {}),
        ("mistral_large4", {"kv_source_layers": [0, 1, 0, 1], "no_rope_layers": [1, 0, 1, 0]}),
    ],
)
def test_layers_that_share_are_measured_with_what_they_share(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_once(decoder: Decoder, version: WeightVersion) -> float:
        Runner(decoder, version, num_sequences=1).step({0: [3, 4]})
        return 1.0

    monkeypatch.setattr("amalgam.planning.pace.step_seconds", run_once)
    save_tiny(next(one for one in all_families() if one.name == family), tmp_path, dtype=torch.bfloat16, **changes)
    loader = ModelLoader(settings_of(tmp_path).model, InferenceSettings(), torch.device("cpu"), 1)
    version = loader.build(loader.plan(), 1).version
    samples = {slot.name: Sample(None, partial(version.__getitem__, slot.name)) for slot in loader.spec.slots}
    assert expected_step(loader.spec, samples.__getitem__, torch.bfloat16, torch.device("cpu")) == 1.0


def test_a_draft_takes_of_the_room() -> None:
    speculation = {"kind": "draft", "draft": str(DEMO)}
    settings = build_settings({"model": {"base_path": str(DEMO)}, "speculation": speculation})
    alone, guessed = found_on(64 * GB, settings_of(DEMO)).fits[0], found_on(64 * GB, settings).fits[0]
    blocks = -(-256 // settings.engine.block_size) * 2
    loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), 1)
    assert guessed.total_bytes - alone.total_bytes == draft_bytes(settings, loader, blocks) > 0
    assert guessed.kv_bytes == alone.kv_bytes


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(DEMO), "--no-measure", "--context", "128", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recommendation"]["fit"]["context"] == 128
    assert document["hardware"]["machine"]["cores"] >= 1
    assert main(["fit", str(DEMO), "--no-measure", "--sequences", "3"]) == 0
    assert "3 sequences" in capsys.readouterr().out
    for arguments in ([], [str(DEMO), "--model", str(DEMO)], [str(DEMO), "--no-measure", "--min-speed", "3"]):
        assert main(["fit", *arguments]) == 2


def test_what_a_card_cannot_hold_is_divided() -> None:
    """Of 16 GB, 12 are experts; the card holds what is dense, the cache and as many of them as fit."""
    parts = Parts(expert_bytes=12 * GB, num_experts=96, read_bytes=4 * GB, active=1 / 8)
    wide, wanted = replace(candidate("base", 16), parts=parts), Wanted(3200, 1)
    machine = replace(hardware(64 * GB), device="cuda", memory_bytes=12 * GB, available_bytes=12 * GB)
    machine = replace(machine, bandwidth=1000e9, far_bandwidth=100e9)
    fit = fit_on(wide, NEEDS, machine, wanted)
    missing = 16 * GB + GB + 2 * GB - machine.room_bytes
    assert fit.far_experts == -(-missing // (12 * GB // 96)) and fit.fits and fit.context == 3200
    assert fit.total_bytes + fit.far_bytes == 16 * GB + GB + 2 * GB
    share = fit.far_experts / 96
    seconds = (4 + 1.5 * (1 - share)) / 1000 + 1.5 * share / 100
    assert fit.at_most == pytest.approx(1 / seconds)
    best = recommend([fit], machine, wanted)
    assert best is not None and "amalgam plan" not in best.commands[-1]
    assert best.commands[-1].startswith("amalgam serve --config plan.yaml")

    narrow = fit_on(candidate("int4", 4.2), NEEDS, machine, wanted)
    best = recommend([fit, narrow], machine, wanted)
    assert best is not None and best.fit.candidate.name == "int4", "what the card holds alone is faster"
    assert not fit_on(wide, NEEDS, replace(machine, machine=hardware(GB).machine), wanted).fits


def test_a_card_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(DEMO), "--gpu", "24GB@1008GB/s", "--context", "128", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["hardware"]["memory_bytes"] == 24 * GB and not document["hardware"]["is_here"]
    best = document["recommendation"]["fit"]
    assert best["candidate"]["tokens_per_second"] is None and best["at_most"] > 0
    for given in ("24", "rtx-1"):
        assert main(["fit", str(DEMO), "--gpu", given]) == 2
    assert main(["fit", str(DEMO), "--gpu", "24GB", "--min-speed", "3"]) == 2
