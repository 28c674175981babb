"""The weight mapping in use: taking the latest change back, and keeping all as a configuration.

In: a version. Out: what changed, YAML. Must never know: tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.config.placement import Placement, Rule
from amalgam.server.api.weights import RemapAnswer, remap_answer
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.http.body import Body, StrictRoute
from amalgam.server.interface import Deployment
from amalgam.server.service import in_own_thread

FILE_NAME = "weight_mapping.yaml"

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class MappingAnswer(BaseModel):
    weight_version: int
    num_rules: int
    is_configured: bool
    """Whether a restart would begin with the same rules."""
    num_undoable: int
    """Changes that can be taken back."""


class UndoBody(Body):
    weight_version: int = Field(ge=1)
    """The version whose change is to be taken back: the one in use."""


@router.get("/dashboard/mapping")
async def mapping(service: ServiceArgument) -> MappingAnswer:
    """Whether the mapping in use would survive a restart."""
    deployment = service.deployment
    return MappingAnswer(
        weight_version=deployment.version_id,
        num_rules=len(deployment.rules),
        is_configured=deployment.rules == deployment.configured_rules,
        num_undoable=deployment.num_undoable,
    )


@router.post("/dashboard/undo", dependencies=[Admission], response_model_exclude_none=True)
async def undo(body: UndoBody, service: ServiceArgument) -> RemapAnswer:
    """Go back to the mapping before the latest change."""
    deployment = service.deployment
    return remap_answer(await in_own_thread(lambda: deployment.undo_weight_mapping(body.weight_version)))


@router.get("/dashboard/mapping.yaml")
async def mapping_yaml(service: ServiceArgument) -> Response:
    """The configuration's section `model` with the mapping in use."""
    deployment = service.deployment
    text = await in_own_thread(lambda: configuration(deployment))
    headers = {"Content-Disposition": f'attachment; filename="{FILE_NAME}"', "X-Content-Type-Options": "nosniff"}
    return Response(text, headers=headers, media_type="application/yaml")


def configuration(deployment: Deployment) -> str:
    """YAML that loads again: section `model` of the settings, with the rules in use as `weight_mapping`; and devices.

    Paths are absolute, so that the file may lie anywhere.
    """
    settings = deployment.settings
    sections = {"model": _model_section(settings.model, deployment.rules)}
    if devices := _device_section(settings.inference):
        sections["inference"] = devices
    head = (
        f"# The weight mapping that {_one_line(deployment.model_name)} used as weight version "
        f"{deployment.version_id}.\n"
        "# Put it in place of the section `model` of the configuration file, or start with it alone.\n"
    )
    return head + yaml.safe_dump(sections, allow_unicode=True, sort_keys=False, width=1000)


def _model_section(model: ModelSettings, rules: Sequence[Rule]) -> dict[str, Any]:
    mixed = model.mixed_precision
    placements: dict[str, Placement] = {}
    for rule in rules:  # the later one wins, in the later place
        placements[rule.pattern] = rule.over(placements.pop(rule.pattern, None))
    kept = mixed.model_dump(exclude_defaults=True, exclude={"sources", "weight_mapping", "rules"})
    section = model.model_dump(exclude_defaults=True, exclude={"mixed_precision", "base_path"})
    return {
        **section,
        "base_path": _absolute(model.base_path),
        "mixed_precision": {
            "sources": {name: _absolute(path) for name, path in mixed.sources.items()},
            **kept,
            "weight_mapping": {pattern: placement.model_dump() for pattern, placement in placements.items()},
        },
    }


def _device_section(inference: InferenceSettings) -> dict[str, Any]:
    """What rules may name as devices, where anything is said of them."""
    return inference.model_dump(include={"device_map", "devices"}) if inference.devices else {}


def _absolute(path: str) -> str:
    """A path as it is found from anywhere; a hub id (`org/name`) stays as it is."""
    expanded = os.path.expanduser(path)
    is_path = os.path.exists(expanded) or expanded.startswith(".") or expanded.count("/") != 1
    return os.path.abspath(expanded) if is_path else path


def _one_line(text: str) -> str:
    return " ".join(text.split())
