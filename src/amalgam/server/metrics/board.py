"""A Grafana board of all that `/metrics` has, and the alert rules in the form that the Prometheus operator takes.

In: the catalogue, the table of panels, the rules in `deploy/monitoring/rules`. Out: JSON and YAML.
`python -m amalgam.server.metrics.board` writes the files; a test compares them, and asks that no family is left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from amalgam.base.files import reading, writing
from amalgam.errors import CheckpointError
from amalgam.server.metrics.catalogue import CATALOGUE, PREFIX
from amalgam.server.metrics.panels import PANELS, Panel
from amalgam.server.metrics.queries import SCRAPED

CHECKOUT = Path(__file__).resolve().parents[4]
BOARD = Path("deploy/monitoring/grafana/amalgam.json")
RULES = (Path("deploy/monitoring/rules/recording.yaml"), Path("deploy/monitoring/rules/alerts.yaml"))
OPERATOR_RULES = Path("deploy/monitoring/prometheus_rule.yaml")
_COLUMNS = 24
_SCHEMA_VERSION = 39  # of Grafana 10.3 and later, which brings it to its own
_DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def board() -> dict[str, Any]:
    """The board as Grafana imports it."""
    return {
        "uid": "amalgam",
        "title": "amalgam",
        "description": "Made by python -m amalgam.server.metrics.board.",
        "tags": ["amalgam", "inference"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_data_source_variable(), *map(_label_variable, SCRAPED)]},
        "annotations": {"list": [_weight_changes()]},
        "panels": list(_placed()),
    }


def operator_rules(root: Path) -> dict[str, Any]:
    """The rules as a `PrometheusRule`."""
    groups = [group for path in RULES for group in yaml.safe_load((root / path).read_text())["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "amalgam", "labels": {"app.kubernetes.io/name": "amalgam"}},
        "spec": {"groups": groups},
    }


def _placed() -> Iterator[dict[str, Any]]:
    """Rows, and their panels from left to right."""
    number, y = 0, 0
    for title, panels in PANELS.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": y},
            "panels": [],
        }
        x, y = 0, y + 1
        height = 4 if panels[0].kind == "stat" else 8
        for panel in panels:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + height
            number += 1
            yield _panel(panel, number, {"h": height, "w": panel.width, "x": x, "y": y})
            x += panel.width
        y += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.alarm is not None:
        steps.append({"color": "red", "value": panel.alarm})
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.unit == "percentunit":
        defaults["min"] = 0
    if panel.kind == "stat":
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
        defaults["color"] = {"mode": "thresholds"}
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 30 if panel.is_stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none"},
            "thresholdsStyle": {"mode": "off" if panel.alarm is None else "line"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": _description(panel),
        "datasource": _DATA_SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATA_SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or panel.title,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _description(panel: Panel) -> str:
    """What the catalogue says of each family that the panel shows."""
    shown = "\n".join(query.expression for query in panel.queries)
    families = [family for family in CATALOGUE.values() if re.search(rf"\b{family.series_pattern}\b", shown)]
    return "\n\n".join(f"`{PREFIX}{family.name}`: {family.help_text}" for family in families)


def _data_source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _label_variable(label: str) -> dict[str, Any]:
    """The values that a label of the scrape has; all of them to begin with."""
    chosen = "" if label == SCRAPED[0] else f'{{{SCRAPED[0]}=~"${SCRAPED[0]}"}}'
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": _DATA_SOURCE,
        "query": {"query": f"label_values({PREFIX}info{chosen}, {label})", "refId": label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _weight_changes() -> dict[str, Any]:
    """A line across all panels where new requests began to start on other weights."""
    selected = ",".join(f'{label}=~"${label}"' for label in SCRAPED)
    return {
        "name": "Weights changed",
        "datasource": _DATA_SOURCE,
        "enable": True,
        "iconColor": "purple",
        "expr": f"changes({PREFIX}weight_version{{{selected}}}[1m]) > 0",
        "titleFormat": "Weights changed on {{instance}}",
        "step": "60s",
    }


def render_board() -> str:
    return json.dumps(board(), indent=2) + "\n"


def render_operator_rules(root: Path) -> str:
    note = f"# Made of {' and '.join(str(path) for path in RULES)} by python -m amalgam.server.metrics.board.\n"
    return note + yaml.safe_dump(operator_rules(root), sort_keys=False, width=1000, allow_unicode=True)


def write_files(root: Path) -> None:
    """Both, in a checkout.

    Raises:
        CheckpointError: one cannot be read or written, as where `root` is none.
    """
    with reading(root):
        rules = render_operator_rules(root)
    for path, text in ((BOARD, render_board()), (OPERATOR_RULES, rules)):
        with writing(root / path):
            (root / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        write_files(CHECKOUT)
    except CheckpointError as error:
        sys.exit(f"Error: {error}")
