"""What tokens cost: arithmetic from measured throughput, and what is refused instead of being invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amalgam.base.energy import EnergyMeter, EnergyUse
from amalgam.cli import main
from amalgam.errors import AmalgamError, ConfigError, RequestError
from amalgam.tools.cost import (
    CostReport,
    Measurements,
    Wanted,
    cost,
    measurements_of,
    read_measurements,
    read_prices,
    with_energy,
)
from tests.errors import raises

BENCH = {
    "model": "demo",
    "hardware": {"processor": "Some CPU", "gpu": "NVIDIA H100 80GB HBM3"},
    "measurements": [
        {"name": "load", "unit": "s", "value": 1.0},
        {"name": "prompt of 512", "unit": "tokens/s", "value": 1000.0},
        {"name": "decode 1 sequence", "unit": "tokens/s", "value": 50.0},
        {"name": "decode 8 sequences", "unit": "tokens/s", "value": 200.0},
    ],
}
SERVE = {
    "server": {"model": "demo"},
    "points": [
        {
            "load": {"rate": None, "concurrency": 4},
            "tokens": {"prompt": 3000, "output": 1000},
            "throughput": {"output_tokens_per_second": 100.0},
        },
        {
            "load": {"rate": 2.5, "concurrency": None},
            "tokens": {"prompt": 0, "output": 0},
            "throughput": {"output_tokens_per_second": 0.0},
        },
    ],
}
PRICES = """
currency: EUR
currencies: {USD: 1, EUR: 0.9}
electricity: 0.30
machines:
  - {name: rented, per_hour: 3.6, contains: H100, source: me, date: 2026-01}
  - {name: eight, per_hour: 16, count: 8, contains: H100, currency: USD, source: me, date: 2026-01}
  - {name: bought, purchase: 7300, months: 10, watts: 500, contains: Some CPU, source: me, date: 2026-01}
apis:
  - {name: api, input: 1, output: 2, currency: USD, source: them, date: 2026-02}
"""


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.yaml"
    file.write_text(PRICES)
    return file


def report(prices: Path, document: dict[str, Any] = BENCH, ratio: float = 0.0, **wanted: Any) -> CostReport:
    return cost(measurements_of(document, ratio, "a test"), read_prices(prices), Wanted(**wanted))


def test_costs_are_rents_by_tokens(prices: Path) -> None:
    found = report(prices, utilisations=(1.0, 0.25))
    rented, eight = found.machines  # whose card was measured
    assert (found.currency, rented.per_hour, rented.per_month) == ("EUR", 3.6, pytest.approx(3.6 * 730))
    assert eight.per_hour == pytest.approx(16 / 8 * 0.9)
    one, several = rented.loads
    assert one.tokens_per_second == 50 and several.tokens_per_second == 200
    assert one.per_1000_tokens == {"1": pytest.approx(3.6 / 3600 / 50 * 1000), "0.25": pytest.approx(4 * 0.02)}
    assert several.tokens_per_month == pytest.approx(200 * 3600 * 730)
    assert one.joules_per_token is None and one.kind == "measured"
    assert report(prices, currency="USD").machines[0].per_hour == pytest.approx(4.0)


def test_prompts_take_their_time_beside_new_tokens(prices: Path) -> None:
    found = report(prices, ratio=4.0)
    assert found.machines[0].loads[1].tokens_per_second == pytest.approx(1 / (1 / 200 + 4 / 1000))
    assert found.break_even[0].api_per_million == pytest.approx((2 + 4 * 1) * 0.9)


def test_an_api_is_dearer_from_so_many_tokens_on(prices: Path) -> None:
    rented = report(prices).break_even[0]
    monthly, per_token = 3.6 * 730, 2 * 0.9 / 1e6
    assert (rented.api, rented.machine, rented.load) == ("api", "rented", "8 sequences")
    assert rented.tokens_per_month == pytest.approx(monthly / per_token)
    assert rented.utilisation == pytest.approx(monthly / per_token / (200 * 3600 * 730)) and rented.utilisation > 1


def test_other_machines_only_have_what_they_would_have_to_give(prices: Path) -> None:
    [other] = report(prices).others
    assert other.machine == "bought" and other.loads == ()
    cheapest = 16 / 8 * 0.9 / 3600 / 200
    assert other.needed_tokens_per_second == pytest.approx(other.per_hour / 3600 / cheapest)


def test_own_machines_are_written_off_and_take_energy(prices: Path) -> None:
    bench = {**BENCH, "hardware": {"processor": "Some CPU"}}
    [bought] = report(prices, bench).machines
    assert bought.energy_per_hour == pytest.approx(0.5 * 0.30)
    assert bought.per_hour == pytest.approx(7300 / (10 * 730) + 0.15)
    measured = with_energy(measurements_of(bench, 0.0, "a test"), EnergyUse(10.0, 1000.0))
    [bought] = cost(measured, read_prices(prices), Wanted()).machines
    assert bought.energy_per_hour == pytest.approx(0.1 * 0.30)
    assert bought.loads[0].joules_per_token == pytest.approx(100 / 50)


def test_a_benchmark_of_serving_brings_its_own_mix(prices: Path) -> None:
    found = report(prices, SERVE, machines=("rented",))
    [load] = found.machines[0].loads
    assert (load.load, load.tokens_per_second, load.prompt_tokens) == ("4 clients", 100.0, 3.0)
    with raises(ConfigError, "per-hour"):  # it does not say what it ran on
        report(prices, SERVE)
    assert report(prices, SERVE, per_hour=7.2).machines[0].per_month == pytest.approx(7.2 * 730)


def test_throughput_is_not_carried_over_to_other_hardware(prices: Path) -> None:
    for wanted in ({"machines": ("bought",)}, {"machines": ("nonsense",)}, {"currency": "XXX"}):
        with pytest.raises(ConfigError):
            report(prices, **wanted)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"points": []}', '{"measurements": [{"name": 3}]}', json.dumps({**BENCH, "measurements": []})],
)
def test_what_is_no_measurement_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(RequestError):
        read_measurements(file, 1.0)
    with pytest.raises(RequestError):
        read_measurements(tmp_path / "none", 1.0)


@pytest.mark.parametrize(
    ("document", "key", "value"),
    [
        ({**BENCH, "model": 3}, "model", "3"),
        ({**BENCH, "measurements": {}}, "measurements", "{}"),
        ({**BENCH, "measurements": [{"name": "load", "unit": "s"}, {"unit": "tokens/s"}]}, "measurements[1].name", ""),
        (
            {**BENCH, "measurements": [{"name": "load", "unit": "tokens/s", "value": "fast"}]},
            "measurements[0].value",
            "'fast'",
        ),
        ({**SERVE, "server": {}}, "server.model", ""),
        ({**SERVE, "points": [{**SERVE["points"][0], "tokens": {"prompt": 1}}]}, "points[0].tokens.output", ""),
        ({**SERVE, "points": [{**SERVE["points"][0], "load": 2}]}, "points[0].load", "2"),
    ],
)
def test_what_is_wrong_in_a_measurement_is_named(document: dict[str, Any], key: str, value: str) -> None:
    with raises(RequestError, "a test", key, *([value] if value else [])):
        measurements_of(document, 0.0, "a test")


def test_a_measurement_that_two_readers_would_read_differently_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    for text, named in (('{"model": "a", "model": "b"}', "'model'"), ('{"model": NaN}', "NaN")):
        file.write_text(text)
        with raises(RequestError, file, named):
            read_measurements(file, 0.0)


def test_a_table_and_its_last_line_are_read(tmp_path: Path) -> None:
    file = tmp_path / "bench.txt"
    file.write_text("some table\n" + json.dumps(BENCH) + "\n")
    found = read_measurements(file, 0.0)
    assert found == Measurements("demo", "NVIDIA H100 80GB HBM3", found.paces, str(file))


@pytest.mark.parametrize(
    "change",
    [
        ("per_hour: 3.6, ", ""), ("months: 10, ", ""), ("source: them, ", ""), ("date: 2026-02", "date: yesterday"),
        ("currency: USD, source: them", "currency: CHF, source: them"), ("electricity", "electricty"),
        ("output: 2", "output: 0"), ("count: 8", "count: many"),
    ],
)  # fmt: skip
def test_a_table_of_prices_that_is_wrong_is_refused(prices: Path, change: tuple[str, str]) -> None:
    prices.write_text(PRICES.replace(*change))
    with pytest.raises(ConfigError):
        read_prices(prices)


def test_prices_that_come_along_have_a_source_each() -> None:
    table = read_prices(None)
    assert table.machines and table.apis
    assert all(row.source.startswith("https://") for row in (*table.machines, *table.apis))


def test_the_verb_prints_costs_and_refuses_what_has_no_effect(
    tmp_path: Path, prices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(BENCH))
    assert main(["estimate", "--cost", "--measured", str(file), "--prices", str(prices), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machines"][0]["machine"] == "rented"
    assert main(["estimate", "--cost", "--measured", str(file)]) == 0
    assert "h100-cloud" in capsys.readouterr().out
    for flags in (["--measured", str(file)], ["--cost", "--measured", str(file), "--expected"], ["--cost"],
                  ["--cost", "--measured", str(file), "--utilisation", "2"],
                  ["--cost", "--measured", str(file), "--machine", "a", "--per-hour", "1"]):  # fmt: skip
        assert main(["estimate", *flags]) == AmalgamError.exit_code


def counter(folder: Path, name: str, microjoules: int) -> None:
    package = folder / name
    package.mkdir(exist_ok=True)
    (package / "energy_uj").write_text(str(microjoules))
    (package / "max_energy_range_uj").write_text("10000000")


def test_energy_is_that_of_all_packages_and_counters_begin_anew(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 5)):
        counter(tmp_path, name, value)
    meter = EnergyMeter(tmp_path)
    counter(tmp_path, "intel-rapl:0", 3_000_000)
    counter(tmp_path, "intel-rapl:1", 500_000)
    use = meter.read()
    assert use.joules == pytest.approx(2.0 + 1.5) and use.watts is not None and use.watts > 0
    assert meter.read().joules == pytest.approx(3.5)
    empty = tmp_path / "none"
    empty.mkdir()
    assert EnergyMeter(empty).read().joules is None and EnergyMeter(empty).read().why_not
