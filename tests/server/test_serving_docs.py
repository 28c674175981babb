"""docs/serving names every field, refused ones too, and every setting of serving."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from pydantic import BaseModel

from amalgam.cli.options import OTHERS, SHORT
from amalgam.config.engine import EngineSettings
from amalgam.config.filters import FilterRule, FiltersSettings
from amalgam.config.inference import InferenceSettings
from amalgam.config.server import ServerSettings
from amalgam.config.speculation import SpeculationSettings
from amalgam.config.weights import WeightsSettings
from amalgam.engine.params import SamplingParams
from amalgam.server.api.anthropic.fields import MessagesBody
from amalgam.server.api.common import WeightsField
from amalgam.server.api.openai.chat import ChatBody
from amalgam.server.api.openai.completions import CompletionBody
from amalgam.server.api.openai.embeddings import EmbeddingBody
from amalgam.server.api.openai.refusing import OpenAIBody
from amalgam.server.api.openai.responses import ResponseBody
from amalgam.server.api.openai.tokenize import DetokenizeBody, TokenizeBody
from amalgam.server.api.weights.answers import PlanAnswer, RemapAnswer
from amalgam.server.api.weights.updates import ReloadBody, UpdateWeightMappingBody
from amalgam.server.api.weights.versions import (
    DifferenceAnswer,
    NameBody,
    PlanBody,
    RollbackBody,
    VersionAnswer,
    WeightsAnswer,
)
from tests.conftest import ROOT

OPENAI = (CompletionBody, ChatBody, ResponseBody, EmbeddingBody, TokenizeBody, DetokenizeBody)


def words_of(*pages: str) -> set[str]:
    """What stands in code font, taken apart at dots, commas and the like."""
    text = "".join((ROOT / "docs/serving" / page).read_text(encoding="utf-8") for page in pages)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {word for code in re.findall(r"`([^`\n]+)`", prose) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("body", OPENAI, ids=lambda body: body.__name__)
def test_openai_s_fields(body: type[OpenAIBody]) -> None:
    named = words_of("openai.md")
    assert {field.alias or name for name, field in body.model_fields.items()} - named == set()
    assert {*body.refused, *body.refused_everywhere} - named == set()


def test_anthropic_s_fields() -> None:
    assert {*MessagesBody.model_fields, *MessagesBody.refused} - words_of("anthropic.md") == set()


@pytest.mark.parametrize(
    "shape",
    [
        *(WeightsField, UpdateWeightMappingBody, ReloadBody, PlanBody, NameBody, RollbackBody),
        *(RemapAnswer, PlanAnswer, VersionAnswer, WeightsAnswer, DifferenceAnswer, WeightsSettings),
    ],
    ids=lambda shape: shape.__name__,
)
def test_weight_versions(shape: type[BaseModel]) -> None:
    assert set(shape.model_fields) - words_of("weights.md") == set()


def test_python_s_parameters() -> None:
    assert {field.name for field in fields(SamplingParams)} - words_of("sampling.md") == set()


@pytest.mark.parametrize("section", [ServerSettings, EngineSettings, InferenceSettings, SpeculationSettings])
def test_settings(section: type[BaseModel]) -> None:
    assert set(section.model_fields) - words_of("operation.md", "chat-templates.md", "trials.md") == set()


def test_flags_of_other_servers() -> None:
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`([^`]+)`", row) for row in text.splitlines() if row.startswith("|")]
    for key, names in OTHERS.items():
        short = SHORT.get(key, key)
        for name in names:
            assert any(name in row and (key in row or short in row) for row in rows), (name, key)


@pytest.mark.parametrize("section", [FilterRule, FiltersSettings])
def test_filters(section: type[BaseModel]) -> None:
    text = (ROOT / "docs/serving/filters.md").read_text(encoding="utf-8")
    assert set(section.model_fields) - set(re.findall(r"\w+", text)) == set()
