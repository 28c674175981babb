"""Dockerfile, compose, Kubernetes: they agree with each other, with the settings and with the metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from amalgam.config.keys import all_settings, environment_name
from amalgam.config.reading import load_settings
from amalgam.config.settings import Settings
from amalgam.server.metrics.board import BOARD, OPERATOR_RULES, RULES
from amalgam.server.metrics.catalogue import CATALOGUE, PREFIX
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VARIABLES = {environment_name(info.key) for info in all_settings()}
IMAGE_USER = 10001


def read(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def resolved(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Every object that a kustomization brings, with its file. Each file that it names has to be there."""
    [kustomization] = read(folder / "kustomization.yaml")
    for entry in [*kustomization.get("resources", ()), *kustomization.get("components", ())]:
        path = (folder / entry).resolve()
        if path.is_dir():
            yield from resolved(path)
        else:
            yield from ((path, document) for document in read(path))
    for generator in kustomization.get("configMapGenerator", ()):
        data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
        yield folder, {"kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


@pytest.fixture(scope="module", params=OVERLAYS, ids=lambda path: path.name)
def objects(request: pytest.FixtureRequest) -> dict[tuple[str, str], Any]:
    found = [document for _, document in resolved(request.param)]
    by_name = {(document["kind"], document["metadata"]["name"]): document for document in found}
    assert len(by_name) == len(found)
    return by_name


@pytest.fixture
def pod(objects: dict[tuple[str, str], Any]) -> Any:
    return objects["StatefulSet", "amalgam"]["spec"]["template"]["spec"]


@pytest.fixture
def settings(objects: dict[tuple[str, str], Any], tmp_path: Path) -> Settings:
    """Of the servers in the cluster."""
    path = tmp_path / "model_config.yaml"
    path.write_text(objects["ConfigMap", "amalgam-config"]["data"]["model_config.yaml"])
    return load_settings(path, environ={})


def dockerfile() -> tuple[str, str]:
    """The stage that builds, and the one that is left; lines that go on are one."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    build, last = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[1:]
    return build, last


def test_image_runs_without_root_and_pip_and_has_a_compiler_for_triton_alone() -> None:
    build, last = dockerfile()
    assert "g++" in build and "g++" not in last and "pip install" not in last
    [installs] = re.findall(r"^RUN .*apt-get install.*$", last, re.MULTILINE)
    assert re.search(r'^RUN if .*find_spec\("triton"\).*; then .*\bgcc libc6-dev\b.*; +fi$', installs)
    assert re.search(rf"^USER {IMAGE_USER}:{IMAGE_USER}$", last, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*/health'", last, re.MULTILINE)
    set_by_us = set(re.findall(r"\b(AMALGAM_\w+)=", last))
    assert set_by_us and set_by_us <= VARIABLES
    [volumes] = re.findall(r"^VOLUME (.*)$", last, re.MULTILINE)
    assert json.loads(volumes) == ["/models", "/cache"]


def test_build_context_has_what_is_copied_and_no_more() -> None:
    copied = set(re.findall(r"\S+", " ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile()[0], re.MULTILINE))))
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_configurations_are_ours() -> None:
    settings = load_settings(DEPLOY / "compose/config/model_config.yaml", environ={})
    assert settings.model.base_path == "/models/demo"
    assert (ROOT / "models/demo/config.json").exists()
    assert all(path.startswith(("/models/", "/cache/")) for path in settings.model.mixed_precision.sources.values())


def test_compose_agrees_with_image_and_settings() -> None:
    [compose] = read(DEPLOY / "compose/compose.yaml")
    amalgam, prometheus, grafana = (compose["services"][name] for name in ("amalgam", "prometheus", "grafana"))
    settings = load_settings(DEPLOY / "compose/config/model_config.yaml", environ={})
    assert int(amalgam["stop_grace_period"].removesuffix("s")) >= settings.server.drain_seconds + 10
    assert set(amalgam["environment"]) <= VARIABLES
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / "compose" / source).exists() or source.startswith("${")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    [scrape] = read(DEPLOY / "compose/prometheus.yaml")
    assert [Path(name).name for name in scrape["rule_files"]] == [path.name for path in RULES]
    [job] = scrape["scrape_configs"]
    assert job["job_name"] == "amalgam" and job["static_configs"] == [{"targets": ["amalgam:8080"]}]
    assert f"../{RULES[0].parent.relative_to('deploy')}:/etc/prometheus/rules:ro" in prometheus["volumes"]
    [provider] = read(DEPLOY / "compose/grafana/dashboards/amalgam.yaml")[0]["providers"]
    assert f"../{BOARD.parent.relative_to('deploy')}:{provider['options']['path']}:ro" in grafana["volumes"]


def test_each_file_belongs_to_an_overlay() -> None:
    used = {path for overlay in OVERLAYS for path, _ in resolved(overlay)}
    values = KUBERNETES / "components/autoscale-adapter/adapter_values.yaml"  # of another program
    manifests = {path for path in KUBERNETES.rglob("*.yaml") if path.name not in ("kustomization.yaml", values.name)}
    assert manifests - used == {KUBERNETES / "base/model_config.yaml"}
    assert ROOT / OPERATOR_RULES in used


def test_a_server_that_goes_has_time_to_finish(pod: Any, settings: Settings) -> None:
    [container] = pod["containers"]
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(pause) + settings.server.drain_seconds + 10
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}


def test_pods_have_what_they_name(objects: dict[tuple[str, str], Any], pod: Any, settings: Settings) -> None:
    [container] = pod["containers"]
    claims = {claim["metadata"]["name"] for claim in objects["StatefulSet", "amalgam"]["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in pod["volumes"]} | claims
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    for volume in pod["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in objects
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in objects
    assert {variable["name"] for variable in container["env"]} <= VARIABLES
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    paths = (settings.statistics.file, settings.weights.history, settings.server.export_dir)
    assert all(path.startswith(tuple(f"{folder}/" for folder in written)) for path in paths)
    assert objects["StatefulSet", "amalgam"]["spec"]["serviceName"] in {
        name for kind, name in objects if kind == "Service"
    }


def test_pods_are_confined(pod: Any) -> None:
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == IMAGE_USER
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert float(container["resources"]["limits"]["cpu"]).is_integer()


def test_autoscalers_ask_for_metrics_that_are_there(objects: dict[tuple[str, str], Any]) -> None:
    scalers = [
        document for (kind, _), document in objects.items() if kind in ("HorizontalPodAutoscaler", "ScaledObject")
    ]
    [scaler] = scalers
    assert scaler["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"
    asked = json.dumps(scaler)
    if scaler["kind"] == "HorizontalPodAutoscaler":
        [values] = read(KUBERNETES / "components/autoscale-adapter/adapter_values.yaml")
        rules = values["rules"]["custom"]
        offered = {rule.get("name", {}).get("as") or rule["seriesQuery"].partition("{")[0] for rule in rules}
        assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} == offered
        asked = json.dumps([(rule["seriesQuery"], rule["metricsQuery"]) for rule in rules])
    series = set(re.findall(rf"\b{PREFIX}\w+", asked))
    assert {"amalgam_requests_waiting", "amalgam_kv_blocks_used"} <= series
    assert series <= {family.series for family in CATALOGUE.values()}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_what_is_resolved(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        built = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True).stdout
        found = {(item["kind"], item["metadata"]["name"]) for item in yaml.safe_load_all(built)}
        assert found == {(document["kind"], document["metadata"]["name"]) for _, document in resolved(overlay)}
        [stateful_set] = [item for item in yaml.safe_load_all(built) if item["kind"] == "StatefulSet"]
        assert "replicas" not in stateful_set["spec"]  # the autoscaler says how many
        [policy] = [item for item in yaml.safe_load_all(built) if item["kind"] == "NetworkPolicy"]
        labels = stateful_set["spec"]["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
