"""The Python interface: the same engine without a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from amalgam import LLM, Grammar, SamplingParams
from amalgam.checkpoint.writer import write_checkpoint
from amalgam.cli import main
from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import (
    ConfigError,
    PlanError,
    PromptTooLongError,
    RequestError,
    UnsupportedError,
    VersionNotFoundError,
)
from amalgam.experts.saved.files import load, to_bytes
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.registry import read_spec
from amalgam.runtime.chats import message_of
from amalgam.text.answers.contract import ContentDelta, ReasoningDelta, ToolCallDelta
from tests.conftest import DEMO, ROOT
from tests.errors import raises

GREEDY = SamplingParams(max_new_tokens=12, do_sample=False)


@pytest.fixture
def llm(demo_config: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(config=demo_config, settings={"inference.max_seq_length": getattr(request, "param", 256)}) as llm:
        yield llm


def test_generate_and_stream_agree(llm: LLM) -> None:
    answers = llm.generate(["The old man", "def main("], GREEDY)
    streamed = "".join(output.text for output in llm.stream("The old man", GREEDY))
    assert streamed == answers[0].text
    assert answers[0].text != answers[1].text
    assert llm.generate("The old man", GREEDY)[0].text == streamed


def test_weights_change_while_others_stay(llm: LLM) -> None:
    first = llm.generate("The old man", GREEDY)[0].token_ids
    told: list[tuple[str, int, int]] = []
    changed = llm.update_weight_mapping(
        {"model.layers.*.mlp.experts.*": "base"}, progress=lambda *step: told.append(step)
    )
    assert changed.changed and told[-1][1] == told[-1][2] > 0
    second = llm.generate("The old man", GREEDY)[0].token_ids
    llm.set_weight_mapping({}, name="plain")
    [plain] = [live for live in llm.versions if live.names == ("plain",)]
    assert llm.versions[0].version.version_id == changed.version
    assert {origin.source for origin in plain.version.origins.values()} == {"base"}
    [answer] = llm.generate("The old man", GREEDY, weights="plain")
    assert answer.usage.version == plain.version.version_id
    assert "".join(output.text for output in llm.stream("The old man", GREEDY, weights="plain")) == answer.text
    assert llm.generate("The old man", GREEDY)[0].token_ids == second

    planned = llm.plan_update({"model.layers.0.mlp.experts.*": "fp8"})
    assert {weight.source_after for weight in planned.changed} == {"fp8"}
    assert {weight.source_after for weight in llm.difference(changed.version, "plain").changed} == {"base"}
    llm.pin(plain.version.version_id)
    llm.remove_weights("plain")
    assert [live.states for live in llm.versions if live.version is plain.version] == [("pinned",)]
    llm.unpin(plain.version.version_id)
    with raises(VersionNotFoundError, "plain"):
        llm.remove_weights("plain")
    del plain

    assert {weight.source_after for weight in llm.plan_update(rules={}, name="other").changed} == {"base"}
    assert llm.plan_update(rules=llm.versions[0].rules).changed == []
    assert llm.plan_update(reload=True).load.num_weights == 0
    assert {weight.source_before for weight in llm.plan_update(version=1).changed} == {"base"}
    for wrong in ({}, {"reload": True, "version": 1}, {"mapping": {}, "rules": {}}):
        with pytest.raises(RequestError):
            llm.plan_update(**wrong)

    change = llm.start_update({"model.layers.0.mlp.experts.*": "fp8"})
    assert change.wait().version == llm.versions[0].version.version_id
    assert llm.start_rollback().wait().version == changed.version
    llm.name_weights("here")
    named = llm.start_update(version="here", name="there").wait()
    assert (named.name, named.version) == ("there", changed.version)
    assert llm.versions[0].names == ("here", "there")
    assert llm.start_update(reload=True, name="anew").wait().num_loaded == 0
    for name in ("here", "there", "anew"):
        llm.remove_weights(name)
    assert llm.rollback(1).fingerprint and llm.generate("The old man", GREEDY)[0].token_ids == first
    kinds = ["mapping", "rules", "mapping", "rollback", "version", "version", "reload", "rollback"]
    assert [(status.kind, status.state) for status in llm.changes] == [(kind, "done") for kind in kinds]
    with raises(VersionNotFoundError, "nobody"):
        llm.generate("The old man", GREEDY, weights="nobody")
    with raises(PlanError, "model.nothing"):
        llm.update_weight_mapping({"model.nothing": None})
    assert llm.changes[-1].error_type == PlanError.code


def test_the_models_own_sampling_holds_where_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    config = {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.3, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(config))
    with LLM(model=folder, settings={"inference.max_seq_length": 64}) as llm:
        assert llm.default_params == SamplingParams(do_sample=False, max_new_tokens=5, repetition_penalty=1.3)
        [answer] = llm.generate("The old man")
        assert len(answer.token_ids) == 5
        assert [llm.generate("The old man")[0].text for _ in range(3)] == [answer.text] * 3
        assert llm.generate("The old man", SamplingParams(max_new_tokens=4))[0].token_ids == answer.token_ids[:4]
        assert "".join(output.text for output in llm.stream("The old man")) == answer.text
        assert len({llm.generate("The old man", SamplingParams(temperature=9.0))[0].text for _ in range(5)}) > 1
        told = llm.model_info()["sampling_defaults"]
        assert told["from_model"] == ["do_sample", "max_new_tokens", "repetition_penalty"]
        assert told["not_honoured"] == {"num_beams": "4"}
    assert main(["generate", "The old man", "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["generated_text"] == answer.text


def test_log_probabilities_come_with_the_tokens(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=6, do_sample=False, repetition_penalty=1.0, logprobs=2)
    [answer] = llm.generate("The old man", params)
    assert len(answer.logprobs) == len(answer.token_ids) == 6
    for token_id, logprobs in zip(answer.token_ids, answer.logprobs, strict=True):
        assert logprobs.top[0] == (token_id, logprobs.chosen)
        assert 0 > logprobs.top[0][1] >= logprobs.top[1][1]
    streamed = [logprobs for output in llm.stream("The old man", params) for logprobs in output.logprobs]
    assert tuple(streamed) == answer.logprobs
    assert llm.generate("The old man", GREEDY)[0].logprobs == ()


def test_leaving_a_stream_cancels_it(llm: LLM) -> None:
    stream = llm.stream("The old man", SamplingParams(max_new_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    engine = llm.engine
    while engine.status().num_running:
        pass
    assert engine.status().num_free_blocks == engine.status().num_blocks


def test_remap_and_statistics(llm: LLM) -> None:
    llm.generate("The old man", GREEDY)
    summary = llm.expert_stats(top_k=3)["summary"]
    assert summary["total_activations"] == summary["total_tokens"] * 4 * 6
    assert len(llm.expert_stats(top_k=3)["top_experts"]) == 3
    result = llm.update_weight_mapping({"model.layers.*.mlp.experts.*": "fp8"})
    assert result.version == 2
    assert llm.generate("The old man", GREEDY)[0].usage.version == 2
    assert llm.model_info()["precisions"]["fp8"]["weights"] == 287


def test_domains_and_routed_experts(tmp_path: Path) -> None:
    with LLM(model=DEMO, settings={"inference.max_seq_length": 64}) as llm:
        [answer] = llm.generate("The old man", GREEDY, domain="prose", routed_experts=True)
        assert answer.trace is not None
        num_tokens = answer.usage.num_prompt_tokens + answer.usage.num_new_tokens - 1
        assert answer.trace.expert_ids.shape == answer.trace.gate_weights.shape == (num_tokens, 6, 4)
        assert llm.generate("The old man", GREEDY)[0].trace is None
        statistics = llm.expert_stats()
        assert statistics["labels"] == [{"label": "prose", "tokens": num_tokens}]
        assert statistics["summary"]["total_tokens"] == 2 * num_tokens
        llm.save_expert_stats(tmp_path / "a.npz")
        assert load(tmp_path / "a.npz").labels["prose"].num_tokens.sum() == num_tokens
    with LLM(model=DEMO, settings={"statistics.enabled": False}) as llm, pytest.raises(UnsupportedError):
        llm.generate("The old man", GREEDY, domain="prose")


def test_statistics_survive_a_restart(tmp_path: Path) -> None:
    settings = {"inference.max_seq_length": 64, "statistics.file": str(tmp_path / "kept.npz")}
    totals = []
    for _ in range(2):
        with LLM(model=DEMO, settings=settings) as llm:
            llm.generate("The old man", GREEDY)
            totals.append(llm.expert_stats()["summary"]["total_tokens"])
    assert totals[1] == 2 * totals[0] > 0


def test_a_reference_is_checked_at_the_start_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    settings = {"inference.max_seq_length": 64, "statistics.reference": str(path)}
    with raises(ConfigError, "statistics.reference", tmp_path / "reference.npz"):
        LLM(model=DEMO, settings=settings)
    other = ExpertTracker((0, 1), 8, 2, StatisticsSettings(), model="other")
    path.write_bytes(to_bytes(other.saved_set()))
    with raises(ConfigError, tmp_path / "other.npz", "2 layers of 8", "6 of 16"):
        LLM(model=DEMO, settings=settings | {"statistics.reference": str(path.rename(tmp_path / "other.npz"))})
    with LLM(model=DEMO, settings={"inference.max_seq_length": 64}) as llm:
        llm.generate("The old man", GREEDY)
        llm.save_expert_stats(path)
    with LLM(model=DEMO, settings=settings) as llm:
        path.unlink()
        llm.generate("The old man", GREEDY)
        assert llm.expert_stats()["drift"]["reference"] == "statistics.reference, demo"


def test_bad_input_is_refused() -> None:
    with raises(ConfigError, "config", "model"):
        LLM()
    with LLM(model=DEMO, settings={"inference.max_seq_length": 64}) as llm:
        with raises(PromptTooLongError, 63):
            llm.generate("word " * 100)
        assert llm.generate("word", GREEDY)[0].text


def test_peak_memory_is_the_weights_and_little_more(tmp_path: Path) -> None:
    """At most the final weights, ten per cent and the largest tensor, above what a process needs without weights."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 16}
    config = json.loads((DEMO / "config.json").read_text()) | sizes
    config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    family, spec = read_spec(config, "config.json")
    names = ((family.logical_name(slot), torch.zeros(slot.shape, dtype=torch.bfloat16)) for slot in spec.slots)
    write_checkpoint(tmp_path, names)
    program = """
import sys, torch
from amalgam.composition.loader import ModelLoader
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.engine.memory import peak_memory_bytes
loader = ModelLoader(ModelSettings(base_path=sys.argv[1]), InferenceSettings(), torch.device("cpu"), threads=2)
planned = loader.plan()
before = peak_memory_bytes()
version = loader.build(planned, 1).version
print(peak_memory_bytes() - before, version.nbytes, max(version[slot].nbytes for slot in version.origins))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    grown, weights, largest = map(int, result.stdout.split())
    assert weights > 300 * 2**20
    assert grown <= 1.1 * weights + largest


@pytest.mark.parametrize("llm", [1024], indirect=True)
def test_answers_follow_grammars(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    # A grammar lets 64 characters of white space stand at each of eight places: with less room an answer may be cut.
    params = SamplingParams(max_new_tokens=600, top_k=0, top_p=1.0, temperature=1.0)
    answers = llm.generate(["The old man", "def main("] * 4, params, grammar=Grammar.of_schema(schema))
    for answer in answers:
        assert answer.finish_reason == "stop"
        found = json.loads(answer.text)
        assert found["size"] in {"small", "large"} and 0 <= found["count"] <= 99
    streamed = "".join(
        output.text
        for output in llm.stream("The", SamplingParams(max_new_tokens=8), grammar=Grammar("regex", "[ab]{4}"))
    )
    assert re.fullmatch("[ab]{4}", streamed)
    with raises(RequestError, "not"):
        llm.generate("The", grammar=Grammar.of_schema({"not": {}}))
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    sampled = ["generate", "The", "--model", str(DEMO), "--top-k", "0", "--temperature", "1", "--max-new-tokens", "600"]
    assert main([*sampled, "--json-schema", str(tmp_path / "schema.json")]) == 0
    assert json.loads(capsys.readouterr().out)["size"] in {"small", "large"}
    assert main([*sampled, "--regex", "[0-9]{3}"]) == 0
    assert re.fullmatch("[0-9]{3}\n", capsys.readouterr().out)
    assert main([*sampled, "--regex", "[0-9]{3}", "--json-schema", str(tmp_path / "schema.json")]) == 2
    assert main([*sampled, "--json-schema", str(tmp_path / "missing.json")]) == 2


def test_a_repeated_token_is_penalized(llm: LLM) -> None:
    [plain] = llm.generate("The old man", SamplingParams(max_new_tokens=40, do_sample=False))
    [varied] = llm.generate("The old man", SamplingParams(max_new_tokens=40, do_sample=False, frequency_penalty=2.0))
    assert len(set(varied.token_ids)) > len(set(plain.token_ids))


HELLO = [{"role": "user", "content": "Hello"}]


def test_a_chat_is_answered_as_the_template_has_it(llm: LLM) -> None:
    [answer] = llm.chat(HELLO, GREEDY)
    assert answer.message == {"role": "assistant", "content": answer.generation.text} and answer.generation.text
    again = [*HELLO, answer.message, {"role": "user", "content": "And then?"}]
    both = llm.chat([HELLO, again], GREEDY)
    assert both[0].message == answer.message and both[1].generation.usage.num_prompt_tokens > len(answer.message)
    [digits] = llm.chat(HELLO, SamplingParams(max_new_tokens=8), grammar=Grammar("regex", "[0-9]{3}"))
    assert re.fullmatch("[0-9]{3}", digits.message["content"])
    with raises(RequestError, "tools"):
        llm.chat(HELLO, tools=[{"type": "function", "function": {"name": "f"}}], grammar=Grammar("regex", "x"))
    with raises(RequestError, "message"):
        llm.chat([])


def test_reasoning_and_calls_are_set_apart() -> None:
    deltas = [
        ReasoningDelta("Let me "), ReasoningDelta("see."), ContentDelta("It "), ContentDelta("rains."),
        ToolCallDelta(1, "b", "g", "{}"), ToolCallDelta(0, "a", "f", '{"x":'), ToolCallDelta(0, "a", None, "1}"),
    ]  # fmt: skip
    assert message_of(deltas) == {
        "role": "assistant", "content": "It rains.", "reasoning_content": "Let me see.",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }  # fmt: skip


def test_a_call_that_breaks_off_is_content() -> None:
    deltas = [ContentDelta("So: "), ToolCallDelta(0, "a", "f", "{}"), ToolCallDelta(1, "b", "g", '{"x": [1')]
    message = message_of(deltas)
    assert message["content"] == 'So: g({"x": [1'
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]


def test_what_is_awaited_is_what_is_returned(llm: LLM) -> None:
    prompts = ["The old man", "def main("]
    expected = [answer.text for answer in llm.generate(prompts, GREEDY)]

    async def ask() -> None:
        several = await asyncio.gather(llm.agenerate(prompts, GREEDY), llm.achat(HELLO, GREEDY))
        assert [answer.text for answer in several[0]] == expected
        assert several[1][0].message == llm.chat(HELLO, GREEDY)[0].message
        assert (await llm.aembed(prompts, "last") == llm.embed(prompts, "last")).all()
        assert "".join([output.text async for output in llm.astream(prompts[0], GREEDY)]) == expected[0]
        endless = SamplingParams(max_new_tokens=200, ignore_eos=True)
        waiting = asyncio.create_task(llm.agenerate(prompts * 8, endless))
        async with contextlib.aclosing(llm.astream(prompts[0], endless)) as outputs:
            await anext(outputs)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with raises(PromptTooLongError, 255):
            await llm.agenerate(["x", "word " * 1000])

    asyncio.run(ask())
    engine = llm.engine
    while engine.status().num_running or engine.status().num_waiting:
        pass
