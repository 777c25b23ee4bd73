"""The application for Ray Serve as far as it is put together without Ray: flags, deploy files, deployments' options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import StartupError
from engine.serve_ray import deployment_options, main, plan_from, read_model, read_plan
from server.ray.scaling import Replicas

DEPLOY = Path(__file__).parent.parent / "server" / "deploy" / "ray" / "serve.yaml"


def test_the_deploy_file_is_a_plan() -> None:
    [described] = yaml.safe_load(DEPLOY.read_text())["applications"]
    assert described["import_path"] == "engine.serve_ray:application"
    plan = read_plan(described["args"])
    assert [model.replicas for model in plan.models] == [Replicas(1, 4), Replicas(1, 1)]
    scaled, fixed = (deployment_options(model, plan) for model in plan.models)
    assert scaled["autoscaling_config"]["max_replicas"] == 4 and "num_replicas" not in scaled
    assert fixed["num_replicas"] == 1 and "autoscaling_config" not in fixed
    assert (scaled["max_ongoing_requests"], fixed["max_ongoing_requests"]) == (72, 18)
    # Serve's own wait for requests ends after the engine's drain.
    assert scaled["graceful_shutdown_timeout_s"] > plan.models[0].config.server.drain_timeout_s


def test_flags_are_the_servers_and_models_may_be_several() -> None:
    plan, args = plan_from(
        ["--replicas", "1..3", "--port", "8123", "--max-num-seqs", "4", "--also", "--replicas 2 --served-model-name b"]
    )
    assert [model.replicas for model in plan.models] == [Replicas(1, 3), Replicas(2, 2)]
    assert plan.models[0].config.server.port == 8123 and plan.models[0].config.scheduler.max_num_seqs == 4
    assert plan.models[1].config.model.served_names == ("b",) and args.address is None
    assert plan.gpus is False


def test_ranks_get_one_bundle_of_gpus() -> None:
    plan, _ = plan_from(["--gpus", "--tensor-parallel-size", "4", "--cpus-per-replica", "2"])
    options = deployment_options(plan.models[0], plan)
    assert options["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 4}
    assert options["placement_group_bundles"] == [{"CPU": 4.0, "GPU": 4.0}]
    assert options["placement_group_strategy"] == "STRICT_PACK"


@pytest.mark.parametrize(
    "flags",
    [
        ["--handover", "unix:/tmp/x"],
        ["--resume-journal", "/tmp/x"],
        ["--trace-file", "/tmp/x"],
        ["--kv-events-config", json.dumps({"enable_kv_cache_events": True})],
    ],
)
def test_what_one_server_alone_can_have_is_refused(flags: list[str]) -> None:
    with pytest.raises(StartupError, match="not with replicas"):
        read_model(flags)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "models"),
        ({"models": []}, "models"),
        ({"models": {}}, "models"),
        ({"models": ["--model x"]}, r"models\[0\]"),
        ({"models": [{"flag": ""}]}, "'flag'"),
        ({"models": [{"replicas": "3..1"}]}, "--replicas"),
        ({"models": [{"cpus_per_replica": 0}]}, "cpus"),
        ({"models": [{"cpus_per_replica": "1"}]}, "cpus_per_replica"),
        ({"models": [{}], "fronts": 0}, "fronts"),
        ({"models": [{}], "fronts": True}, "fronts"),
        ({"models": [{}], "gpus": "yes"}, "gpus"),
        ({"models": [{}], "upscale_delay_s": -1}, "upscale_delay_s"),
        ({"models": [{}], "replicas": "1..3"}, "'replicas'"),
    ],
)
def test_wrong_deploy_files_are_told_by_their_keys(args: dict[str, Any], told: str) -> None:
    with pytest.raises(StartupError, match=told):
        read_plan(args)


@pytest.mark.parametrize("flags", ["--replicas 0", "--fronts 0", "--cpus-per-replica 0", "--downscale-delay -1"])
def test_wrong_flags_end_the_start_with_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("flag", ["--port 9999", "--host=0.0.0.0", "--fronts 7", "--address auto"])
def test_flags_of_the_whole_application_are_no_models(flag: str) -> None:
    with pytest.raises(StartupError, match=rf"^{flag.replace('=', ' ').split()[0]} is of the whole application"):
        plan_from(["--also", f"--served-model-name b {flag}"])


def test_where_it_listens_is_not_in_a_models_flags() -> None:
    with pytest.raises(StartupError, match=r"^--ssl-certfile has no effect in a model's flags"):
        read_plan({"models": [{"flags": "--ssl-certfile a.pem"}]})
