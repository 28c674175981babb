"""The sampling that a model's makers advise: used where a request says nothing, and told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from amalgam.engine.generation_config import ModelDefaults, read_model_defaults
from amalgam.engine.params import SamplingParams
from amalgam.errors import CheckpointError
from tests.errors import raises

OURS = SamplingParams()


def read(folder: Path, content: Any) -> ModelDefaults:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_model_defaults(folder)


def test_without_a_file_ours_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_model_defaults(tmp_path).params == SamplingParams()
    assert (OURS.temperature, OURS.top_p, OURS.top_k, OURS.do_sample, OURS.max_new_tokens) == (0.7, 0.9, 50, True, 512)
    assert not caplog.records


def test_what_the_file_says_is_used_and_ours_for_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    says = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.01, "max_new_tokens": 64}
    found = read(tmp_path, {**says, "eos_token_id": [1, 2], "bos_token_id": 0, "transformers_version": "4.51.0"})
    assert found.params == SamplingParams(**says)
    assert found.as_json() == {
        **says, "top_p": 0.9, "do_sample": True, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
        "stop": [], "from_model": sorted(says), "not_honoured": {},
    }  # fmt: skip
    assert not caplog.records


def test_what_transformers_calls_otherwise_is_used_too(tmp_path: Path) -> None:
    found = read(tmp_path, {"min_new_tokens": 3, "stop_strings": ["END", "\n\n"], "presence_penalty": 1.5})
    assert found.params == SamplingParams(min_tokens=3, stop=("END", "\n\n"), presence_penalty=1.5)
    assert found.from_model == {"min_tokens": 3, "stop": ("END", "\n\n"), "presence_penalty": 1.5}
    assert read(tmp_path, {"stop_strings": "END"}).params.stop == ("END",)
    assert read(tmp_path, {"stop_strings": [""]}).not_honoured == {"stop_strings": [""]}


@pytest.mark.parametrize(
    "neutral",
    [
        {"num_beams": 1}, {"temperature": None}, {"no_repeat_ngram_size": 0}, {"typical_p": 1.0},
        {"length_penalty": 1.0}, {"penalty_alpha": None}, {"suppress_tokens": []},
        {"use_cache": True}, {"pad_token_id": 3}, {},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_is_not_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, neutral: dict[str, Any]
) -> None:
    found = read(tmp_path, neutral)
    assert (found.params, found.not_honoured, caplog.records) == (OURS, {}, [])


@pytest.mark.parametrize(
    "other",
    [
        {"num_beams": 4}, {"penalty_alpha": 0.6}, {"no_repeat_ngram_size": 3}, {"typical_p": 0.9}, {"max_length": 4096},
        {"suppress_tokens": [1]}, {"bad_words_ids": [[1]]}, {"some_new_key": 1}, {"temperature": "hot"},
        {"temperature": -1}, {"top_p": 1.5}, {"top_k": True}, {"top_k": -1}, {"do_sample": 1}, {"max_new_tokens": 0},
        {"repetition_penalty": 1e-38}, {"top_k": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_honoured_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO):
        found = read(tmp_path, {"top_p": 0.8, **other})
    assert found.not_honoured == other
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    [(key, value)] = other.items()
    for part in ("generation_config.json", key, repr(value)):
        assert part in record.getMessage()
    if "top_p" not in other:
        assert found.params == SamplingParams(top_p=0.8)
    assert found.as_json()["not_honoured"] == {key: repr(value)}


@pytest.mark.parametrize(
    ("content", "temperature", "not_honoured"),
    [
        ('{"top_p": 0.8, "temperature": NaN}', OURS.temperature, {"temperature": "nan"}),
        ('{"top_p": 0.8, "temperature": -Infinity}', OURS.temperature, {"temperature": "-inf"}),
        ('{"top_p": 0.8, "some_new_key": [1e999]}', OURS.temperature, {"some_new_key": "[inf]"}),
        ('{"temperature": 0.1, "top_p": 0.8, "temperature": 0.6}', 0.6, {"temperature": "0.1"}),
        ('{"top_p": 0.8, "a\\ud800": "\\ud800"}', OURS.temperature, {"a?": r"'\ud800'"}),
    ],
)
def test_what_strict_readers_refuse_is_said_and_the_rest_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, temperature: float, not_honoured: dict[str, str]
) -> None:
    found = read(tmp_path, content)
    assert found.params == SamplingParams(top_p=0.8, temperature=temperature)
    assert found.as_json()["not_honoured"] == not_honoured
    [record] = caplog.records
    assert record.levelno == logging.WARNING and all(key in record.getMessage() for key in not_honoured)


def test_a_byte_order_mark_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path, '\ufeff{"top_p": 0.8}').params == SamplingParams(top_p=0.8)
    assert not caplog.records


def test_a_long_foreign_value_makes_no_long_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, {"suppress_tokens": list(range(10_000)), "x\ny": "a" * 100_000})
    assert len(caplog.text) < 1500
    assert caplog.text.count("\n") == 1


def test_numbers_written_as_floats_are_taken(tmp_path: Path) -> None:
    assert read(tmp_path, {"top_k": 20.0, "temperature": 1, "max_new_tokens": 7.0}).params == SamplingParams(
        top_k=20, temperature=1, max_new_tokens=7
    )


@pytest.mark.parametrize("content", ["{", "[]", '"a"', "[" * 100_000])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    with raises(CheckpointError, tmp_path / "generation_config.json"):
        read(tmp_path, content)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "generation_config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(CheckpointError):
        read_model_defaults(folder)


def test_gguf_has_its_own_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    metadata = {
        "general.architecture": "llama", "general.sampling.temp": 0.5, "general.sampling.top_k": 40,
        "general.sampling.penalty_repeat": 1.1, "general.sampling.mirostat": 2,
    }  # fmt: skip
    found = read_model_defaults(tmp_path / "model.gguf", metadata)
    assert found.params == SamplingParams(temperature=0.5, top_k=40, repetition_penalty=1.1)
    assert found.not_honoured == {"general.sampling.mirostat": 2}
    assert "mirostat" in caplog.text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"do_sample": False, "temperature": 0.2, "max_new_tokens": 9}),
        ({"max_new_tokens": 3}, {"do_sample": False, "temperature": 0.2, "max_new_tokens": 3}),
        (
            {"seed": 1, "stop": "x"},
            {"do_sample": False, "temperature": 0.2, "seed": 1, "stop": "x", "max_new_tokens": 9},
        ),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 9}),  # our default, but given
        ({"top_k": 5}, {"do_sample": True, "temperature": 0.2, "top_k": 5, "max_new_tokens": 9}),
        ({"top_k": 5, "do_sample": False}, {"do_sample": False, "temperature": 0.2, "top_k": 5, "max_new_tokens": 9}),
        ({"do_sample": True}, {"do_sample": True, "temperature": 0.2, "max_new_tokens": 9}),
    ],
)
def test_what_a_request_says_wins(given: dict[str, Any], expected: dict[str, Any]) -> None:
    model = SamplingParams(do_sample=False, temperature=0.2, max_new_tokens=9)
    assert SamplingParams(**given).over(model) == SamplingParams(**expected)


def test_fields_given_by_position_are_known_too() -> None:
    assert SamplingParams(3, 0.1, min_p=0.2).given == {"max_new_tokens", "temperature", "min_p"}
