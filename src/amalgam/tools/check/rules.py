"""Alerting rules for Prometheus: of a file, or as a Prometheus has loaded them.

In: YAML, or the JSON of its API. Out: rules, and what is wrong with them. Must never know which ones are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amalgam.errors import ConfigError
from amalgam.tools.load.http import Address

_STRING = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|`[^`]*`")
_MATCHERS = re.compile(r"\{[^{}]*\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        is_alert: else it records what others ask for.
    """

    name: str
    expression: str
    is_alert: bool


def read(path: Path) -> list[Rule]:
    """
    Raises:
        ConfigError: it is no file of rules.
    """
    try:
        data = yaml.safe_load(path.read_text())
        groups = (data.get("spec") or data)["groups"]  # a PrometheusRule of Kubernetes has them in its spec
        return [
            Rule(str(rule.get("alert") or rule["record"]), str(rule["expr"]), "alert" in rule)
            for group in groups
            for rule in group["rules"]
        ]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no file of rules for Prometheus ({type(error).__name__}: {error}).",
            remedy="Expected `groups:` with `rules:`; `promtool check rules` says more.",
        ) from None


def loaded(data: Mapping[str, Any]) -> list[Rule]:
    """Of the API's `rules`."""
    return [
        Rule(str(rule.get("name", "")), str(rule.get("query", "")), rule.get("type") == "alerting")
        for rule in _rules(data)
    ]


def unhealthy(data: Mapping[str, Any]) -> list[str]:
    """What Prometheus could not evaluate."""
    return [
        f"{rule.get('name')} cannot be evaluated: {rule.get('lastError', '')}"
        for rule in _rules(data)
        if rule.get("health") == "err"
    ]


def _rules(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [rule for group in data.get("groups") or () for rule in group.get("rules") or ()]


def unscraped(data: Mapping[str, Any], address: Address) -> list[str]:
    """What keeps the metrics of an address out of a Prometheus; the API's `targets`."""
    active = data.get("activeTargets") or ()
    # Inside a cluster a server may have another name than here; its port is the same.
    ours = [one for one in active if f":{address.port}/" in str(one.get("scrapeUrl", ""))]
    if not ours:
        return [f"Prometheus reads nothing at port {address.port}"]
    return [f"Prometheus cannot read {one['scrapeUrl']}: {one.get('lastError', '')}"
            for one in ours if one.get("health") == "down"]  # fmt: skip


def names_in(expression: str) -> set[str]:
    """Names of metrics in PromQL, and some words of its own, which no server has as a prefix."""
    text = _STRING.sub(" ", expression)
    for pattern in (_MATCHERS, _RANGE, _GROUPING):
        text = pattern.sub(" ", text)
    return set(_NAME.findall(text))
