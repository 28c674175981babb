"""Prometheus queries over the catalogue's families.

In: names of families. Out: `Query`: an expression, and how its series are named. Must never know: panels.

A family that is not in the catalogue, or is of another type than the query is for, is a KeyError or an assertion.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from amalgam.server.metrics.catalogue import CATALOGUE, Declared

SCRAPED = ("job", "instance")  # labels that a scrape adds; the board's variables bear their names
SELECTED = "{" + ",".join(f'{label}=~"${label}"' for label in SCRAPED) + "}"
WINDOW = "[$__rate_interval]"
QUANTILES = (0.5, 0.95, 0.99)
# Codes of errors that are no fault of the request: the server could not, or not in time. All of 500 and above.
SERVER_FAULTS = (
    "draining", "failed", "filter_failed", "internal_error", "loading", "non_finite_logits", "out_of_memory",
    "overloaded", "replica_lost", "timed_out", "unavailable", "weights_failed", "weights_lost",
)  # fmt: skip


class Query(NamedTuple):
    """An expression and the names of its series, in Grafana's `{{label}}`."""

    expression: str
    legend: str


def rates(*names: str) -> list[Query]:
    """How often a second counters go up, all servers together, by their own labels."""
    return [
        Query(f"sum{_by(family)} (rate({family.series}{SELECTED}{WINDOW}))", _legend(family, len(names) > 1))
        for family in (_declared(name, "counter") for name in names)
    ]


def levels(*names: str, over: Literal["sum", "avg", "max"] = "sum") -> list[Query]:
    """Gauges now, by their own labels; over the servers their sum, mean or most."""
    return [
        Query(f"{over}{_by(family)} ({family.series}{SELECTED})", _legend(family, len(names) > 1))
        for family in (_declared(name, "gauge") for name in names)
    ]


def each(*names: str) -> list[Query]:
    """Gauges now, server by server."""
    families = [_declared(name, "gauge") for name in names]
    return [
        Query(f"{family.series}{SELECTED}", " ".join(["{{instance}}", _legend(family, len(names) > 1)]).strip())
        for family in families
    ]


def quantiles(name: str, of: tuple[float, ...] = QUANTILES) -> list[Query]:
    """Of a histogram, all servers together."""
    family = _declared(name, "histogram")
    rate = f"sum by (le) (rate({family.series}{SELECTED}{WINDOW}))"
    return [Query(f"histogram_quantile({quantile:g}, {rate})", f"P{100 * quantile:g}") for quantile in of]


def means(*names: str) -> list[Query]:
    """Of histograms: sum by count."""
    queries = []
    for name in names:
        family = _declared(name, "histogram").series.removesuffix("_bucket")
        total, count = (f"sum(rate({family}_{part}{SELECTED}{WINDOW}))" for part in ("sum", "count"))
        queries.append(Query(f"{total} / {count}", _words(name)))
    return queries


def busy(name: str) -> list[Query]:
    """Part of the time that a histogram's seconds take, server by server."""
    family = _declared(name, "histogram").series.removesuffix("_bucket")
    return [Query(f"rate({family}_sum{SELECTED}{WINDOW})", "{{instance}}")]


def shares(part: str, whole: str) -> list[Query]:
    """One counter's rate by another's, or one gauge by another, server by server."""
    first, second = CATALOGUE[part], CATALOGUE[whole]
    assert (first.kind != "histogram" and second.kind == "gauge") or first.kind == second.kind == "counter"
    label = " {{" + "}} {{".join(first.labels) + "}}" if first.labels else ""
    matched = " / ignoring(" + ",".join(first.labels) + ") group_left() " if first.labels else " / "
    return [Query(_value(first) + matched + _value(second), "{{instance}}" + label)]


def most(queries: list[Query]) -> list[Query]:
    """Of all servers the one with the most."""
    return [Query(f"max({query.expression})", "") for query in queries]


def error_share() -> list[Query]:
    """Requests that failed by no fault of their own, of all that ended: refused, or ended by an error on the way, as a
    stream does. What the engine ends with an error before its answer has begun counts as both.
    """
    faults = SELECTED[:-1] + f',reason=~"{"|".join(SERVER_FAULTS)}"' + "}"
    errors = SELECTED[:-1] + ',reason="error"}'
    refused = f"sum(rate({CATALOGUE['requests_refused'].series}{faults}{WINDOW}))"
    finished = CATALOGUE["requests_finished"].series
    broken, ended = (f"sum(rate({finished}{selected}{WINDOW}))" for selected in (errors, SELECTED))
    return [Query(f"({refused} + {broken}) / ({refused} + {ended})", "failed")]


def _value(family: Declared) -> str:
    selected = f"{family.series}{SELECTED}"
    return f"rate({selected}{WINDOW})" if family.kind == "counter" else selected


def _declared(name: str, kind: str) -> Declared:
    family = CATALOGUE[name]
    assert family.kind == kind, f"{name} is a {family.kind}"
    return family


def _by(family: Declared) -> str:
    return f" by ({', '.join(family.labels)})" if family.labels else ""


def _legend(family: Declared, is_named: bool) -> str:
    """The labels' values, behind the family's name where there are several or no label tells."""
    labels = [f"{{{{{label}}}}}" for label in family.labels]
    return " ".join([_words(family.name), *labels] if is_named else labels)


def _words(name: str) -> str:
    for unit in ("_seconds", "_tokens", "_bytes", "_bits"):
        name = name.removesuffix(unit) or name
    return name.replace("_", " ")
