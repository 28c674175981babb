"""The manifest of a plan: where every byte will come from, before it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from amalgam.cli import main
from amalgam.composition.loader import ModelLoader
from amalgam.composition.manifest import plan_manifest
from amalgam.config.reading import load_settings


def test_it_names_the_version_and_digests_its_bytes(demo_config: Path) -> None:
    settings = load_settings(demo_config, environ={})
    loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), 2)
    planned = loader.plan()
    document = plan_manifest(planned, digest_threads=2)
    assert document["fingerprint"] == loader.build(planned, 1).version.fingerprint
    assert len(document["weights"]) == 344
    formats = {weight["format"] for weight in document["weights"]}
    assert formats == {"bf16", "fp8", "int4"}
    for weight in document["weights"]:
        for part in weight["parts"]:
            with open(part["file"], "rb") as file:
                file.seek(part["offset"])
                assert hashlib.sha256(file.read(part["nbytes"])).hexdigest() == part["sha256"]


def test_the_command_prints_it(demo_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(demo_config), "--manifest"]) == 0
    document = json.loads(capsys.readouterr().out)
    rules = {weight["name"]: weight["rule"] for weight in document["weights"]}
    assert rules["model.layers.0.mlp.experts.0.down_proj.weight"] == "exact name"
    assert rules["model.layers.0.mlp.experts.9.down_proj.weight"] == "pattern model.layers.*.mlp.experts.*"
    assert main(["plan", "--config", str(demo_config), "--sha256"]) == 2
