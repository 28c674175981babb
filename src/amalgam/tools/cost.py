"""What tokens cost: measured throughput × prices.

In: a document of `amalgam bench` or `amalgam bench serve`, or a measurement made now; a table of prices. Out: costs by
load and utilisation, and from how many tokens a month a machine is cheaper than an API. Must never know: terminals.

Throughput is only ever that of the machine that was measured. Of other machines it says what they would have to give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from amalgam.base.energy import EnergyUse
from amalgam.base.fields import Fields
from amalgam.base.strict_json import parse_json
from amalgam.base.validation import expectation
from amalgam.config.fields import Section
from amalgam.config.text import read_yaml
from amalgam.errors import CheckpointError, ConfigError, RequestError, describe

HOURS_PER_MONTH = 730.0
PRICES = Path(__file__).with_name("prices.yaml")
_MAX_DOCUMENT_BYTES = 256 * 2**20


class MachinePrice(Section):
    """One machine: rented by the hour, or bought."""

    name: str = Field(min_length=1)
    description: str = ""
    per_hour: float | None = Field(default=None, ge=0)
    purchase: float | None = Field(default=None, ge=0)
    months: float | None = Field(default=None, gt=0)
    watts: float | None = Field(default=None, gt=0)
    contains: str = ""
    count: int = Field(default=1, ge=1)
    currency: str = ""
    source: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}(-\d{2}){0,2}$")

    @model_validator(mode="after")
    def _check_way(self) -> MachinePrice:
        is_bought = self.purchase is not None and self.months is not None
        if (self.per_hour is not None) == is_bought or (self.purchase is None) != (self.months is None):
            raise ValueError(f"machine {self.name!r} needs per_hour, or else purchase and months")
        return self


class APIPrice(Section):
    """What somebody else takes for a million tokens."""

    name: str = Field(min_length=1)
    description: str = ""
    input: float = Field(ge=0)
    output: float = Field(gt=0)
    currency: str = ""
    source: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}(-\d{2}){0,2}$")


class PriceTable(Section):
    """A file of prices; `prices.yaml` says what its keys mean."""

    currency: str = "USD"
    machines: tuple[MachinePrice, ...] = ()
    apis: tuple[APIPrice, ...] = ()
    electricity: float | None = Field(default=None, ge=0)
    currencies: dict[str, float] = Field(default_factory=lambda: {"USD": 1.0})

    @model_validator(mode="after")
    def _check_currencies(self) -> PriceTable:
        rows: list[MachinePrice | APIPrice] = [*self.machines, *self.apis]
        for name in sorted({self.currency, *(row.currency or self.currency for row in rows)}):
            if self.currencies.get(name, 0) <= 0:
                raise ValueError(f"currencies does not say how much of {name} is one US dollar")
        return self

    def converted(self, amount: float, currency: str, into: str) -> float:
        return amount / self.currencies[currency or self.currency] * self.currencies[into]


def read_prices(path: Path | None) -> PriceTable:
    """
    Raises:
        ConfigError: the file is missing or wrong; the message names the key.
    """
    try:
        return PriceTable.model_validate(read_yaml(PRICES if path is None else path))
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: {expectation(item).rstrip('.')}"
            for item in error.errors()
        ]
        raise ConfigError(f"The prices of {str(path)!r} are invalid: {'; '.join(lines)}.") from None


@dataclass(frozen=True)
class Pace:
    """How fast tokens come under one load.

    Attributes:
        load: in words: `8 sequences`.
        tokens_per_second: new tokens of answers, prompts computed meanwhile included.
        prompt_tokens: for each new one.
        kind: `expected`: by the model of this machine's speed, not measured under this load.
    """

    load: str
    tokens_per_second: float
    prompt_tokens: float
    kind: Literal["measured", "expected"] = "measured"


@dataclass(frozen=True)
class Measurements:
    """What was measured, where.

    Attributes:
        hardware: processor or card; empty: the document does not say.
        watts: of the processors, on the average; None: it could not be read.
    """

    model: str
    hardware: str
    paces: tuple[Pace, ...]
    origin: str
    watts: float | None = None
    energy_note: str = ""


def read_measurements(path: Path, prompt_tokens: float) -> Measurements:
    """What `amalgam bench` or `amalgam bench serve` has printed with --json, or as its last line.

    Args:
        prompt_tokens: for each new token, where the document does not say.

    Raises:
        RequestError: it is neither.
    """
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise RequestError(f"{str(path)!r} is too large.", remedy="Give what amalgam bench has printed.")
        text = path.read_bytes().strip()
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be read ({error.strerror}).", remedy="Give a file.") from None
    fault: ValueError | None = None
    for candidate in (text, text.rpartition(b"\n")[2]):
        try:
            document = parse_json(candidate)
        except ValueError as error:
            fault = error  # in the end, the last line's
            continue
        if isinstance(document, dict):
            return measurements_of(document, prompt_tokens, str(path))
    raise RequestError(
        f"{str(path)!r} holds no JSON object" + (f": {fault}." if fault else "."),
        remedy="Give what amalgam bench --json has printed.",
    )


def measurements_of(document: Mapping[str, Any], prompt_tokens: float, origin: str) -> Measurements:
    """
    Raises:
        RequestError: a key is missing or has a value that it cannot have, or there is no throughput.
    """
    fields = _Document(document, origin)
    try:
        if "points" in document:
            paces = [_pace_of_point(point) for point in fields.items("points")]
            model, hardware = fields.object("server").text("model"), ""
        else:
            paces = _paces_of_bench(fields.items("measurements"), prompt_tokens, origin)
            described = fields.object("hardware", default=None)
            model, hardware = fields.text("model"), "" if described is None else _processor_of(described)
    except CheckpointError as error:
        raise RequestError(error.what, remedy=error.remedy) from None
    found = tuple(pace for pace in paces if pace.tokens_per_second > 0)
    if not found:
        raise RequestError(f"{origin} has no throughput.", remedy="Measure again: no answer was whole.")
    return Measurements(model, hardware, found, origin)


class _Document(Fields):
    cure = "Give what amalgam bench --json or amalgam bench serve --json has printed."

    def items(self, key: str) -> list[Self]:
        """The fields of each object in a list."""
        values = self.list(key, of=dict, what="objects")
        return [type(self)(value, self.where, f"{self.path}{key}[{index}].") for index, value in enumerate(values)]


def _processor_of(hardware: _Document) -> str:
    return hardware.text("gpu", default="") or hardware.text("processor", default="")


def _pace_of_point(point: _Document) -> Pace:
    load, tokens = point.object("load"), point.object("tokens")
    rate = load.float("rate", default=None)
    words = f"{rate:g} requests/s" if rate else f"{load.int('concurrency')} clients"
    num_prompt, num_output = tokens.int("prompt"), tokens.int("output")
    speed = point.object("throughput").float("output_tokens_per_second")
    return Pace(words, speed, num_prompt / num_output if num_output else 0.0)


def _paces_of_bench(measurements: Sequence[_Document], prompt_tokens: float, origin: str) -> list[Pace]:
    """Decoding, with the time that prompts take beside it. The longest prompt's speed counts."""
    told = [item for item in measurements if item.text("unit") == "tokens/s"]
    speeds = {item.text("name"): item.float("value", low=0.0) for item in told}
    prompts = [value for name, value in speeds.items() if name.startswith("prompt of")]
    if prompt_tokens and not (prompts and prompts[-1]):
        raise RequestError(f"{origin} has no speed of prompts.", remedy="Give --prompt-tokens 0.")
    beside = prompt_tokens / prompts[-1] if prompt_tokens else 0.0
    return [
        Pace(name.removeprefix("decode "), 1.0 / (1.0 / value + beside), prompt_tokens)
        for name, value in speeds.items()
        if name.startswith("decode ") and value > 0
    ]


@dataclass(frozen=True)
class LoadCost:
    """Of one load on one machine, in the currency of the report.

    Attributes:
        per_1000_tokens: new ones, by utilisation (a share of the time).
        tokens_per_month: at full utilisation.
        joules_per_token: of a new token; None: not known.
    """

    load: str
    kind: str
    tokens_per_second: float
    prompt_tokens: float
    per_1000_tokens: dict[str, float]
    tokens_per_month: float
    joules_per_token: float | None


@dataclass(frozen=True)
class BreakEven:
    """From where on a machine is cheaper than an API.

    Attributes:
        api_per_million: new tokens, with their prompts.
        tokens_per_month: new ones, for which both cost the same.
        utilisation: share of what the machine can give; above 1: it is never cheaper.
    """

    api: str
    machine: str
    load: str
    api_per_million: float
    tokens_per_month: float
    utilisation: float
    source: str
    date: str


@dataclass(frozen=True)
class MachineCost:
    """Of one machine.

    Attributes:
        cards: how many it has; all figures are of one, which is paid for in proportion.
        needed_tokens_per_second: of a machine that was not measured: to be as cheap as the cheapest one that was.
    """

    machine: str
    description: str
    per_hour: float
    per_month: float
    energy_per_hour: float | None
    cards: int
    source: str
    date: str
    loads: tuple[LoadCost, ...] = ()
    needed_tokens_per_second: float | None = None


@dataclass(frozen=True)
class CostReport:
    """Everything that `amalgam estimate --cost` says."""

    model: str
    hardware: str
    origin: str
    currency: str
    hours_per_month: float
    machines: tuple[MachineCost, ...]
    others: tuple[MachineCost, ...]
    break_even: tuple[BreakEven, ...]
    energy_note: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        machines: names of rows; empty: those that the measured hardware is called by.
        per_hour: the price of the measured machine, instead of a row.
        utilisations: shares of the time in which it works.
    """

    machines: tuple[str, ...] = ()
    per_hour: float | None = None
    utilisations: tuple[float, ...] = (1.0, 0.5, 0.1)
    currency: str = ""
    hours_per_month: float = HOURS_PER_MONTH


def cost(measured: Measurements, prices: PriceTable, wanted: Wanted) -> CostReport:
    """
    Raises:
        ConfigError: a machine or a currency is not in the table, or none is the one that was measured.
    """
    currency = wanted.currency or prices.currency
    if currency not in prices.currencies:
        known = ", ".join(prices.currencies)
        raise ConfigError(
            f"The prices know no currency {currency!r}.", remedy=f"Known: {known}. Add it to currencies (--prices)."
        )
    pricing = _Pricing(measured, prices, wanted, currency)
    rows = _rows(measured, prices, wanted)
    machines = tuple(pricing.measured_machine(row) for row in rows)
    cheapest = min(pricing.cheapest_token(machine) for machine in machines)
    others = tuple(pricing.other_machine(row, cheapest) for row in prices.machines if row not in rows)
    return CostReport(
        measured.model,
        measured.hardware,
        measured.origin,
        currency,
        wanted.hours_per_month,
        machines,
        others,
        tuple(pricing.break_even(api, machine) for api in prices.apis for machine in machines),
        measured.energy_note,
    )


def _rows(measured: Measurements, prices: PriceTable, wanted: Wanted) -> list[MachinePrice]:
    """The rows of the machine that was measured."""
    if wanted.per_hour is not None:
        given = {"name": "this machine", "per_hour": wanted.per_hour, "source": "--per-hour", "date": "0000"}
        row = MachinePrice.model_validate({**given, "currency": wanted.currency})
        return [row.model_copy(update={"date": ""})]  # whoever gives it knows when
    by_name = {row.name: row for row in prices.machines}
    for name in wanted.machines:
        if name not in by_name:
            raise ConfigError(
                f"The prices have no machine {describe(name)}.", remedy=f"They have {', '.join(by_name) or 'none'}."
            )
        contains = by_name[name].contains
        if contains and measured.hardware and contains.lower() not in measured.hardware.lower():
            raise ConfigError(
                f"{name} has {contains}, and {measured.hardware} was measured.",
                remedy="Throughput is not carried over to other hardware: measure there with amalgam bench --json.",
            )
    if wanted.machines:
        return [by_name[name] for name in wanted.machines]
    named = [row for row in prices.machines if row.contains and row.contains.lower() in measured.hardware.lower()]
    if not named:
        what = measured.hardware or "the server, of which the measurement does not say what it is"
        raise ConfigError(
            f"The prices have no row for {what}.",
            remedy="Give --per-hour PRICE, --machine NAME, or a row in a file of your own with --prices FILE.",
        )
    return named


class _Pricing:
    """Prices of rows and paces, in one currency."""

    def __init__(self, measured: Measurements, prices: PriceTable, wanted: Wanted, currency: str) -> None:
        self._measured = measured
        self._prices = prices
        self._wanted = wanted
        self._currency = currency

    def measured_machine(self, row: MachinePrice) -> MachineCost:
        watts = self._measured.watts or row.watts
        energy, per_hour = self._per_hour(row, watts)
        loads = tuple(self._load(pace, per_hour, watts) for pace in self._measured.paces)
        return self._machine(row, per_hour, energy, loads)

    def other_machine(self, row: MachinePrice, cheapest_token: float) -> MachineCost:
        energy, per_hour = self._per_hour(row, row.watts)
        needed = None if cheapest_token <= 0 else per_hour / 3600 / cheapest_token
        return self._machine(row, per_hour, energy, needed=needed)

    def cheapest_token(self, machine: MachineCost) -> float:
        return min(machine.per_hour / 3600 / load.tokens_per_second for load in machine.loads)

    def break_even(self, api: APIPrice, machine: MachineCost) -> BreakEven:
        """By the load with the most tokens."""
        best = max(machine.loads, key=lambda load: load.tokens_per_second)
        price = self._converted(api.output + api.input * best.prompt_tokens, api.currency)
        tokens = machine.per_month / price * 1e6
        return BreakEven(
            api.name, machine.machine, best.load, price, tokens, tokens / best.tokens_per_month, api.source, api.date
        )

    def _machine(
        self,
        row: MachinePrice,
        per_hour: float,
        energy: float | None,
        loads: tuple[LoadCost, ...] = (),
        needed: float | None = None,
    ) -> MachineCost:
        per_month = per_hour * self._wanted.hours_per_month
        return MachineCost(
            row.name, row.description, per_hour, per_month, energy, row.count, row.source, row.date, loads, needed
        )

    def _per_hour(self, row: MachinePrice, watts: float | None) -> tuple[float | None, float]:
        """Of energy, and of all. Rents include energy; a card of several is paid for in proportion."""
        if row.per_hour is not None:
            return None, self._converted(row.per_hour, row.currency) / row.count
        assert row.purchase is not None
        assert row.months is not None
        bought = self._converted(row.purchase, row.currency) / (row.months * HOURS_PER_MONTH) / row.count
        if watts is None or self._prices.electricity is None:
            return None, bought
        energy = self._converted(watts / 1000 * self._prices.electricity, "")
        return energy, bought + energy

    def _load(self, pace: Pace, per_hour: float, watts: float | None) -> LoadCost:
        speed = pace.tokens_per_second
        return LoadCost(
            pace.load,
            pace.kind,
            speed,
            pace.prompt_tokens,
            {f"{share:g}": 1000 * per_hour / 3600 / speed / share for share in self._wanted.utilisations},
            speed * 3600 * self._wanted.hours_per_month,
            None if watts is None else watts / speed,
        )

    def _converted(self, amount: float, currency: str) -> float:
        return self._prices.converted(amount, currency, self._currency)


def with_energy(measured: Measurements, use: EnergyUse) -> Measurements:
    """The same with what the processors used while it was measured."""
    note = f"energy is not known: {use.why_not}" if use.joules is None else "energy is that of the whole processors"
    return Measurements(measured.model, measured.hardware, measured.paces, measured.origin, use.watts, note)
