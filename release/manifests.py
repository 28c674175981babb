"""What deploys amalgam, checked by the tools of those who will read it. `make manifests` runs it.

In: Dockerfile and `deploy/`. Out: a line for each check, and exit code 1 if one failed. hadolint reads the Dockerfile,
Docker Compose its file, Kubernetes' own schemas what kustomize builds, Prometheus its configuration, rules and tests.
kubectl and promtool are the system's: without one, its checks are left out, and said so; with `--all` it fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "monitoring" / "rules"
KUBERNETES = ("1.34", "1.37")  # the versions whose schemas are asked
BIN = Path(sys.executable).parent


class FaultError(Exception):
    """What a tool says against a file."""


class MissingError(Exception):
    """A tool is not installed."""


def tool(name: str) -> str:
    """
    Raises:
        MissingError: neither this environment nor the system has it.
    """
    found = shutil.which(name, path=str(BIN)) or shutil.which(name)
    if found is None:
        raise MissingError(f"{name} is not installed")
    return found


def said(name: str, *arguments: str | Path) -> str:
    """What a tool prints.

    Raises:
        FaultError: it is not content.
    """
    command = [tool(name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode:
        raise FaultError(f"{result.stdout}{result.stderr}".strip())
    return result.stdout


def dockerfile() -> str:
    said("hadolint", "Dockerfile")
    return said("hadolint", "--version").strip()


def compose() -> str:
    told = yaml.safe_load(said("docker-compose", "--file", DEPLOY / "compose" / "compose.yaml", "config"))
    return f"{len(told['services'])} services, Docker Compose {said('docker-compose', 'version', '--short').strip()}"


def kubernetes(overlay: Path) -> Callable[[], str]:
    def check() -> str:
        built = [item for item in yaml.safe_load_all(said("kubectl", "kustomize", overlay)) if item]
        others = {item["kind"] for item in built if not _is_known(item)}
        known = [item for item in built if item["kind"] not in others]
        for item in known:
            for version in KUBERNETES:
                try:
                    kubernetes_validate.validate(item, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    raise FaultError(
                        f"{item['kind']} {item['metadata']['name']} in {version}: {error.message}"
                    ) from None
        _show_that_faults_are_seen(known)
        rest = ", ".join(sorted(others))
        return f"{len(known)} objects in {' and '.join(KUBERNETES)}; operators' own, not checked: {rest}"

    return check


def _is_known(item: Mapping[str, Any]) -> bool:
    """Whether Kubernetes itself has the kind."""
    group = item["apiVersion"].rpartition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


def _show_that_faults_are_seen(items: list[dict[str, Any]]) -> None:
    """Each object with a field too many has to be refused: a schema that takes anything checks nothing."""
    for item in items:
        spoilt = deepcopy(item)
        spoilt.get("spec", spoilt)["noSuchField"] = 1
        try:
            kubernetes_validate.validate(spoilt, KUBERNETES[-1], strict=True)
        except kubernetes_validate.ValidationError:
            continue
        raise FaultError(f"{item['kind']} {item['metadata']['name']} is taken with a field that there is not")


@contextmanager
def _as_mounted() -> Iterator[Path]:
    """Prometheus' folder as the compose file lays it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(DEPLOY / "compose" / "prometheus.yaml", folder)
        shutil.copytree(RULES, Path(folder) / "rules", ignore=shutil.ignore_patterns("tests.yaml"))
        yield Path(folder) / "prometheus.yaml"


def prometheus() -> str:
    with _as_mounted() as config:
        said("promtool", "check", "config", config)
    said("promtool", "check", "rules", "--lint=all", RULES / "recording.yaml", RULES / "alerts.yaml")
    said("promtool", "test", "rules", RULES / "tests.yaml")
    return said("promtool", "--version").partition(" (")[0]


def checks() -> dict[str, Callable[[], str]]:
    overlays = sorted(path.parent for path in (DEPLOY / "kubernetes" / "overlays").glob("*/kustomization.yaml"))
    found = {"Dockerfile": dockerfile, "deploy/compose/compose.yaml": compose}
    found |= {str(overlay.relative_to(ROOT)): kubernetes(overlay) for overlay in overlays}
    return {**found, "deploy/monitoring/rules": prometheus}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="a tool that is not installed is a failure")
    options = parser.parse_args()
    faults = 0
    for name, check in checks().items():
        try:
            print(f"ok       {name}: {check()}")
        except FaultError as error:
            faults += 1
            print(f"FAILED   {name}: {error}")
        except MissingError as error:
            faults += options.all
            print(f"left out {name}: {error}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
