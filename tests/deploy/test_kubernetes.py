"""The manifests: strict schemas of Kubernetes, what refers to what, and what kustomize makes of each combination of the
components."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import commands
from agent.cli import cli
from agent.config import keys, read
from postcopy import __version__
from tests.agent.agents import ROOT
from tests.programs import say

KUBERNETES = ROOT / "deploy/kubernetes"
COMPONENTS = sorted(folder.name for folder in (KUBERNETES / "components").iterdir())
COMBINATIONS = [chosen for count in range(len(COMPONENTS) + 1) for chosen in combinations(COMPONENTS, count)]
# Resources of operators, of which Kubernetes itself has no schema.
OPERATORS = {"PrometheusRule", "ServiceMonitor"}
OLDEST = "1.31"


def documents(text: str) -> dict[str, dict[str, Any]]:
    """Return the resources of a text by their kind."""
    found = [one for one in yaml.safe_load_all(text) if one]
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


def base() -> dict[str, dict[str, Any]]:
    listed = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["resources"]
    return documents("\n---\n".join((KUBERNETES / "base" / name).read_text() for name in listed))


def monitoring(name: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((KUBERNETES / "components/monitoring" / name).read_text())
    return made


def rendered(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is no package of Debian's that is new enough")
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def combined(folder: Path, chosen: Iterable[str], **own_words: str) -> Path:
    """Make what an operator writes: the base, some components, and what else is said."""
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    own = folder / "kubernetes/own"
    own.mkdir()
    said = {"resources": ["../base"], "components": [f"../components/{name}" for name in chosen], **own_words}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(said))
    return own


def wanted(chosen: tuple[str, ...]) -> set[str]:
    """Return what components add: kinds of resources, and pools of huge pages, which they are named for."""
    return (OPERATORS if "monitoring" in chosen else set()) | {name for name in chosen if name.startswith("hugepages-")}


def judged(text: str, folder: Path) -> None:
    """Hold all that is rendered against the strict schemas."""
    file = folder / "all.yaml"
    file.write_text(text)
    done = say("kubernetes-validate", "--strict", "--no-warn", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", [OLDEST, "1.37"])
@pytest.mark.parametrize("file", sorted(KUBERNETES.glob("base/*.yaml")), ids=lambda file: file.stem)
def test_resources_are_as_kubernetes_wants_them(file: Path, version: str) -> None:
    if file.name == "kustomization.yaml":
        return
    done = say("kubernetes-validate", "--strict", "-k", version, file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout + done.stderr


def test_a_wrong_key_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((KUBERNETES / "base/daemonset.yaml").read_text().replace("hostNetwork:", "hostNetwrk:"))
    assert say("kubernetes-validate", "--strict", wrong).returncode == 1


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda chosen: "+".join(chosen) or "base")
def test_every_combination_of_components_is_whole(chosen: tuple[str, ...], tmp_path: Path) -> None:
    text = rendered(combined(tmp_path, chosen))
    judged(text, tmp_path)
    found = documents(text)
    assert set(found) == {"Namespace", "DaemonSet", "Service", "ConfigMap"} | (OPERATORS & wanted(chosen))
    namespaces = {kind: one["metadata"].get("namespace") for kind, one in found.items()}
    assert namespaces == {kind: None if kind == "Namespace" else "postcopy" for kind in found}
    volumes = found["DaemonSet"]["spec"]["template"]["spec"]["volumes"]
    assert found["ConfigMap"]["metadata"]["name"] in {one.get("configMap", {}).get("name") for one in volumes}
    assert ("insecure = true" in found["ConfigMap"]["data"]["destination.toml"]) == ("plain" in chosen)
    limits = found["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    pools = wanted(chosen) - OPERATORS
    assert set(limits) == {"memory", "squat.ai/userfaultfd"} | pools
    assert limits["memory"] == ("256Mi" if pools else "4160Mi")


def test_a_namespace_of_ones_own_is_everywhere(tmp_path: Path) -> None:
    found = documents(rendered(combined(tmp_path, COMPONENTS, namespace="guests")))
    assert found.pop("Namespace")["metadata"]["name"] == "guests"
    assert {one["metadata"]["namespace"] for one in found.values()} == {"guests"}


def test_the_example_is_whole(tmp_path: Path) -> None:
    """It names every component, and what it says is the last word."""
    text = rendered(KUBERNETES / "example")
    judged(text, tmp_path)
    (container,) = documents(text)["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example/postcopy:{__version__}"
    assert container["resources"]["limits"]["hugepages-2Mi"] == "16Gi"
    written = (KUBERNETES / "example/kustomization.yaml").read_text()
    assert sorted(re.findall(r"^  (?:# )?- \.\./components/(\S+)$", written, re.MULTILINE)) == COMPONENTS
    assert [name for name in COMPONENTS if f"`{name}`" not in (KUBERNETES / "README.md").read_text()] == []


def test_parts_refer_to_each_other() -> None:
    found = base()
    template = found["DaemonSet"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    labels = template["metadata"]["labels"].items()
    assert found["Service"]["spec"]["selector"].items() <= labels
    ports = {one["name"] for one in container["ports"]}
    assert {one["targetPort"] for one in found["Service"]["spec"]["ports"]} <= ports
    monitor = monitoring("servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= found["Service"]["metadata"]["labels"].items()
    assert {one["port"] for one in monitor["endpoints"]} <= {one["name"] for one in found["Service"]["spec"]["ports"]}
    assert container["image"] == f"postcopy:{__version__}"


def test_a_pod_has_no_right_but_a_device() -> None:
    pod = base()["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert "livenessProbe" not in container


def test_the_configuration_is_right_and_named_as_the_pod_reads_it() -> None:
    commands.register(cli)
    settings, problems = read.read_file(KUBERNETES / "base/destination.toml", keys.sections(cli))
    assert problems == []
    (container,) = base()["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["--config", "/etc/postcopy/destination.toml", "destination"]
    ports = {one["name"]: str(one["containerPort"]) for one in container["ports"]}
    said = settings["destination"]
    assert str(said["listen"]).rpartition(":")[2] == ports["migration"]
    assert str(said["metrics"]).rpartition(":")[2] == ports["metrics"]


def test_guests_come_encrypted_unless_a_component_says_otherwise() -> None:
    commands.register(cli)
    known = keys.sections(cli)
    said, plain = (
        read.read_file(KUBERNETES / folder / "destination.toml", known) for folder in ("base", "components/plain")
    )
    assert said[1] == plain[1] == []
    encrypted = dict(said[0]["destination"])
    folder = encrypted.pop("tls-dir")
    assert {**encrypted, "insecure": True} == plain[0]["destination"]
    pod = base()["DaemonSet"]["spec"]["template"]["spec"]
    (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["mountPath"] == folder]
    (volume,) = [one for one in pod["volumes"] if one["name"] == mount["name"]]
    assert (volume["secret"]["defaultMode"], mount["readOnly"]) == (0o440, True)
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_the_operator_gets_the_rules_that_are_tested() -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules/postcopy.yml").read_text())
    assert monitoring("prometheusrule.yaml")["spec"] == rules
    kinds = {monitoring(file.name)["kind"] for file in KUBERNETES.glob("components/monitoring/[!k]*.yaml")}
    assert kinds == OPERATORS
