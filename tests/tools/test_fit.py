"""What is recommended on machines of all sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amalgam.base.machine import Machine
from amalgam.cli import main
from amalgam.config.settings import Settings, build_settings
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
    recommend,
)
from tests.conftest import DEMO

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


def test_nothing_fits() -> None:
    found, machine = fits(4 * GB, Wanted(3200, 4), *ALL)
    assert recommend(found, machine, Wanted(3200, 4)) is None
    assert all(fit.spare_bytes < 0 and not fit.sequences for fit in found)


def test_without_speeds_what_is_there_is_preferred() -> None:
    wanted = Wanted(3200, 1)
    found, machine = fits(64 * GB, wanted, candidate("int8", 8, None, "quantize int8"), candidate("mine", 7.8))
    best = recommend(found, machine, wanted)
    assert best is not None and best.fit.candidate.name == "mine"


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


def test_speed_is_measured_on_a_few_layers() -> None:
    report = found_on(64 * GB, settings_of(DEMO), measures=True)
    assert all(fit.candidate.tokens_per_second for fit in report.fits)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(DEMO), "--no-measure", "--context", "128", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recommendation"]["fit"]["context"] == 128
    assert document["hardware"]["machine"]["cores"] >= 1
    assert main(["fit", str(DEMO), "--no-measure", "--sequences", "3"]) == 0
    assert "3 sequences" in capsys.readouterr().out
    for arguments in ([], [str(DEMO), "--model", str(DEMO)], [str(DEMO), "--no-measure", "--min-speed", "3"]):
        assert main(["fit", *arguments]) == 2
