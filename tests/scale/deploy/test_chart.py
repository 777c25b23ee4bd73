"""The Helm chart, rendered by Go's templates with Helm's functions, and plain manifests, against Kubernetes' schemas.

Needs Debian's golang-go and golang-github-masterminds-sprig-dev.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from engine.flags import parse

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "server/deploy"
CHART = DEPLOY / "helm/oneloop"
SOURCES = Path("/usr/share/gocode")
# Kinds of others' operators, which have no schema there.
FOREIGN = {"ScaledObject", "ServiceMonitor", "InferencePool", "InferenceService", "HTTPRoute"}
Values = dict[str, Any]

pytestmark = pytest.mark.skipif(
    shutil.which("go") is None or not (SOURCES / "src/github.com/Masterminds/sprig").is_dir(),
    reason="needs Debian's golang-go and golang-github-masterminds-sprig-dev",
)


def merged(values: Values, more: Values) -> Values:
    found = copy.deepcopy(values)
    for name, value in more.items():
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


@pytest.fixture(scope="session")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("go") / "render"
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": str(SOURCES), "GOCACHE": str(binary.parent / "cache")}
    source = Path(__file__).with_name("render.go")
    subprocess.run(["go", "build", "-o", binary, source], check=True, env=environment, timeout=300)
    return binary


class Chart:
    def __init__(self, renderer: Path) -> None:
        self._renderer = renderer
        self.defaults: Values = yaml.safe_load((CHART / "values.yaml").read_text())

    def text(self, values: Values, release: str = "chat") -> str:
        given = {"release": release, "namespace": "models", "values": merged(self.defaults, values)}
        command, words = [self._renderer, CHART], json.dumps(given)
        done = subprocess.run(command, input=words, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ValueError(done.stderr)
        return done.stdout

    def objects(self, values: Values, release: str = "chat") -> dict[str, Any]:
        """By kind."""
        found = [each for each in yaml.safe_load_all(self.text(values, release)) if each]
        assert len({each["kind"] for each in found}) == len(found)
        return {each["kind"]: each for each in found}


@pytest.fixture
def chart(renderer: Path) -> Chart:
    return Chart(renderer)


def validate(objects: list[Any]) -> None:
    for each in objects:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, "1.31", strict=True)


def container(objects: dict[str, Any]) -> Any:
    (found,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


EVERYTHING: Values = {
    "tensorParallel": 2,
    "gpus": 2,
    "secret": {"name": "keys", "adminApiKey": "admin"},
    "keyFile": {"name": "limits", "kind": "configMap", "file": "keys.toml"},
    "env": [{"name": "OMP_NUM_THREADS", "value": "4"}],
    "args": ["--max-num-seqs", "64", "--ttft-slo", "2"],
    "models": {"persistentVolumeClaim": {"claimName": "models"}},
    "cache": {"volume": {"persistentVolumeClaim": {"claimName": "cache"}}},
    "podLabels": {"team": "search"},
    "podAnnotations": {"note": "a"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
    ],
    "imagePullSecrets": [{"name": "pull"}],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"enabled": True, "from": [{"podSelector": {}}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
    "kvEvents": {"enabled": True},
    "inferencePool": {"enabled": True, "endpointPicker": "picker"},
}


@pytest.mark.parametrize("scaling", ["", "hpa", "keda"])
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_all_of_it_is_valid(chart: Chart, more: Values, scaling: str) -> None:
    objects = chart.objects(merged(more, {"autoscaling": {"kind": scaling}}))
    validate(list(objects.values()))
    assert ("replicas" in objects["Deployment"]["spec"]) == (not scaling)
    kinds = {"Deployment", "Service", "PodDisruptionBudget"}
    kinds |= {"hpa": {"HorizontalPodAutoscaler"}, "keda": {"ScaledObject"}, "": set()}[scaling]
    assert objects.keys() == (kinds | {"ServiceMonitor", "NetworkPolicy", "InferencePool"} if more else kinds)
    # One set of labels finds the pods.
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    budget = objects["PodDisruptionBudget"]["spec"]
    assert objects["Service"]["spec"]["selector"] == budget["selector"]["matchLabels"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_server_takes_its_flags(chart: Chart, more: Values) -> None:
    args = container(chart.objects(more))["args"]
    if "--key-file" in args:
        args[args.index("--key-file") + 1] = str(ROOT / "tests/scale/deploy/keys.toml")
    config, _ = parse(args)
    assert config.tensor_parallel_size == more.get("tensorParallel", 1)
    assert config.server.drain_timeout_s == 120


def test_a_pod_has_time_to_drain(chart: Chart) -> None:
    spec = chart.objects({"drainSeconds": 300, "leaveSeconds": 20})["Deployment"]["spec"]["template"]["spec"]
    (found,) = spec["containers"]
    assert found["args"][found["args"].index("--drain-timeout") + 1] == "300"
    assert found["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert spec["terminationGracePeriodSeconds"] == 335


def test_gpus_and_their_values(chart: Chart) -> None:
    cuda = yaml.safe_load((CHART / "values-cuda.yaml").read_text())
    found = container(chart.objects(cuda))
    assert found["image"] == "oneloop:cuda"
    assert found["resources"]["limits"]["nvidia.com/gpu"] == found["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container(chart.objects({}))["resources"]["limits"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"autoscaling": {"kind": "vpa"}}, "autoscaling.kind is hpa, keda or empty"),
        ({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker names the picker's service"),
    ],
)
def test_values_that_mean_nothing(chart: Chart, values: Values, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        chart.text(values)


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=lambda path: path.name)
def test_plain_manifests_are_valid(path: Path) -> None:
    objects = [each for each in yaml.safe_load_all(path.read_text()) if each]
    assert objects
    validate(objects)
