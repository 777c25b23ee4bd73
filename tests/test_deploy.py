"""What stands in server/deploy names files, flags, extras and routes that there are. More: tests/scale/deploy."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from engine.flags import parse
from server.endpoints.health import ROUTES

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "server/deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PATHS = {path for _, path, _ in ROUTES}


def entry_points() -> list[list[str]]:
    return [json.loads(words) for words in re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)]


def test_the_image_is_made_of_what_there_is() -> None:
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for name in line.split()}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "engine", "server", "bench"}
    assert all((ROOT / name).exists() for name in copied)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    extras = {name for each in re.findall(r"'\.\[([^]]*)\]'", DOCKERFILE) for name in each.split(",")}
    assert "cuda" in extras and extras <= PROJECT["optional-dependencies"].keys()
    (torch,) = [each for each in PROJECT["dependencies"] if each.startswith("torch")]
    assert f"'{torch}'" in DOCKERFILE
    (probe,) = re.findall(r"http://127.0.0.1:8000(/\w+)", DOCKERFILE)
    assert probe in PATHS


def test_the_image_starts_the_server_with_flags_it_knows() -> None:
    points = entry_points()
    assert len(points) == 2
    for module, *flags in (point[2:] for point in points):
        assert module == "engine.serve"
        config, _ = parse(flags)
        assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)


def services() -> dict[str, Any]:
    """Those of compose that serve, with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / "compose.yaml").read_text())
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return {name: service for name, service in found.items() if name != "router"}


def pod() -> Any:
    deployment, *_ = yaml.safe_load_all((DEPLOY / "kubernetes/oneloop.yaml").read_text())
    return deployment["spec"]["template"]["spec"]


def test_commands_are_understood_and_have_time_to_drain() -> None:
    (container,) = pod()["containers"]
    leave = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    given = [(container["args"], pod()["terminationGracePeriodSeconds"] - leave)]
    given += [(each["command"], float(each["stop_grace_period"].removesuffix("s"))) for each in services().values()]
    assert len(given) == 3
    for words, bound in given:
        config, _ = parse(words)
        assert (ROOT / config.model.path).is_dir()
        assert 30 < config.server.drain_timeout_s < bound


def probes(node: Any) -> list[str]:
    if isinstance(node, list):
        return [path for each in node for path in probes(each)]
    if not isinstance(node, dict):
        return []
    own = [node["httpGet"]["path"]] if "httpGet" in node else []
    return own + [path for each in node.values() for path in probes(each)]


def test_probes_ask_for_routes() -> None:
    assert sorted(probes(pod())) == ["/health", "/health", "/ready"] and PATHS.issuperset(probes(pod()))
    template = (DEPLOY / "helm/oneloop/templates/deployment.yaml").read_text()
    asked = re.findall(r"httpGet: \{path: ([^,]+),", template)
    assert len(asked) == 3 and PATHS.issuperset(asked)


def test_the_guide_names_files_that_there_are() -> None:
    text = (DEPLOY / "README.md").read_text()
    for name in re.findall(r"^\| `([^`]+)`", text, re.M):
        assert (DEPLOY / name).exists(), name
    assert "make test-scale PART=deploy" in text and (ROOT / "tests/scale/deploy").is_dir()
