"""The dry run finds nothing that a GPU would punish, and graphs hold exactly as many nodes as is planned.

It needs the real FlashInfer, which is installed without what it needs to run on a GPU: see the Makefile.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels import ENTRY_POINTS, entry_points
from tests.cuda.fake_flashinfer import SIGNATURES
from tests.gpu.support import OUR_ATTENTION, families

ROOT = Path(__file__).parents[2]


def _reason() -> str | None:
    """Why there is no dry run here."""
    for module in ("flashinfer", "tvm_ffi", "pynvml", "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed, which a dry run needs (it is in `make test`'s environment)"
    if not torch.backends.cuda.is_built() and shutil.which("c++") is None:
        return "a dry run needs a C++ compiler where torch is built without CUDA"
    return None


REASON = _reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def dry_run(*scenarios: str) -> list[dict[str, Any]]:
    return [line for scenario in scenarios for line in everything()[scenario]]


@functools.cache
def everything() -> dict[str, list[dict[str, Any]]]:
    """The results of each scenario. All of them in one process: its start takes longer than most."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.cuda.dry",
            *NODES,
            "planted",
            "signatures",
            "features",
            "families",
            "encoders",
            "adapters",
            "experts",
            "drafts",
            "ranks",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")):
        if "scenario" in line:
            results = found.setdefault(line["scenario"], [])
        else:
            results.append(line)
    return found


@pytest.mark.parametrize("scenario", ["features", "families"])
def test_nothing_is_found(scenario: str) -> None:
    """No copy waits or comes from pageable memory, nothing looks at the device, no pointer is unaligned."""
    for result in dry_run(scenario):
        assert not result["error"] and not result["findings"], result
        assert result["captured"] > 0
        # What a kit for the model would hold is at least what was asked for.
        assert set(result["modules"]) <= set(result["kit"]), result
        # What we call beside FlashInfer's own wrapper, we call as that does.
        assert result["forms"] in ({}, {"plan": [1, 9], "run": [1, 18]}), result
        for module, function in result["calls"]:
            assert function in entry_points(module), f"a kit is not asked whether {module} has {function}"
        if "inputs" in result["name"]:
            assert min(result["scaled"]) > 0, "no product of float8 beside graphs, or none in them"
        if result["name"].startswith("drafts"):
            assert result["drafts"], "no graph of a step with drafts"
        if "float32" not in result["name"]:
            assert "torch" not in result["attention"], result
            ours = {"_attend", "_attend_prompts"}.issubset(result["attending"])
            assert ours == result["attention"].startswith("our kernels"), result
    # And a kit is asked for no more than is called.
    called = {(module, what) for result in dry_run(scenario) for module, what in result["calls"]}
    for begin, functions in ENTRY_POINTS.items():
        found = {what for module, what in called if module.startswith(begin)}
        assert found == set(functions) or (scenario == "features" and not found), begin
    names = {result["name"].split()[0] for result in dry_run(scenario)}
    assert scenario == "features" or names == {*families(), *OUR_ATTENTION}


def test_nothing_is_found_with_adapters() -> None:
    """Rows of two adapters and of none, of experts and output layers, too; not of heads of latent attention."""
    results = dry_run("adapters")
    assert len(results) == 4
    for result in results:
        assert not result["error"] and not result["findings"] and result["captured"], result


def test_nothing_is_found_with_models_that_draft() -> None:
    """Draft models, whose drafts may be drawn, EAGLE-3's heads and the layers that checkpoints bring: they read and
    draft in graphs."""
    results = dry_run("drafts")
    assert len(results) == 8
    for result in results:
        assert not result["error"] and not result["findings"], result
        assert result["drafts"] and result["drafting"] > 10, result


def test_nothing_is_found_with_experts_of_codes() -> None:
    """gpt-oss as it is published, float8 of DeepSeek, integers, and two of GGUF's kinds: no graph holds anything but
    kernels, of decode steps by codes; prompts make numbers first, where that is as quick."""
    results = dry_run("experts")
    assert len(results) == 4
    for result in results:
        assert not result["error"] and not result["findings"] and result["captured"], result
        assert all(len(forms) == 2 for forms in result["mixtures"]) and result["mixtures"], result
        assert result["products"] == ["_multiply", "_multiply_codes"], result
        assert "_multiply_codes" in result["captured_products"], result


def test_nothing_is_found_with_ranks() -> None:
    """torch.distributed's own operations, in graphs, too; larger sums of four ranks go by shares of the rows, and every
    one is added up by our kernel."""
    results = dry_run("ranks")
    assert len(results) == 3
    for result in results:
        assert not result["error"] and not result["findings"] and result["captured"] and result["sums"], result
        assert "c10d::_allgather_base_ True" in result["collectives"], result
        by_shares = any("alltoall" in each for each in result["collectives"])
        assert by_shares == result["name"].startswith("4"), result


def test_nothing_is_found_in_encoders() -> None:
    """Whole texts: no graph holds them, and nothing else waits or looks."""
    results = dry_run("encoders")
    assert len(results) == 3
    for result in results:
        assert not result["error"] and not result["findings"], result


def test_a_finding_is_found() -> None:
    """A planted look at the device, a copy from pageable memory and one that waits."""
    (result,) = dry_run("planted")
    found = " ".join(result["findings"])
    assert "brings a value to the host" in found and "pageable" in found and "that waits" in found
    assert "not aligned" in found and "a graph holds" in found


def test_the_stand_in_has_the_real_signatures() -> None:
    """What the tests on the fake device check calls by."""
    (result,) = dry_run("signatures")
    for name, real in result["found"].items():
        known = SIGNATURES.get(name) or SIGNATURES["run"]
        required, _, optional = known.partition("|")
        assert real.partition("|")[0].split() == required.split(), name
        if real.endswith(" ..."):  # what it takes by name beyond that is seen by the other tests alone
            continue
        assert set(optional.split()) <= set(real.split()), name
        if name in SIGNATURES:
            assert real == known, name


# (shape, rows, how it draws): nodes of a layer, and of the rest of the step.
NODES = {
    "llama-3.2-1b:1:plain": (6, 5),
    "llama-3.2-1b:64:plain": (9, 6),
    "llama-3.2-1b:1:filtered": (6, 7),
    "llama-3.2-1b:64:drafts": (9, 7),
    "qwen3-30b-a3b:1:plain": (11, 5),
    "qwen3-30b-a3b:64:plain": (13, 6),
    # A model with places for adapters: rows of none, and rows of some, by two kernels for each of four products, one
    # for the embedding, and three for the output layer, which may have outputs of an adapter's own.
    "llama-3.2-1b:1:plain+places": (6, 5),
    "llama-3.2-1b:1:plain+adapters": (17, 10),
    "llama-3.2-1b:64:plain+adapters": (17, 10),
    "deepseek-v2-lite:1:plain": (25, -2),  # its first layer has no experts
}


def test_the_nodes_of_a_graph_are_counted() -> None:
    """Each costs one to two microseconds. Lower figures are welcome: change the table with what lowered them."""
    found = {f"{r['name']}:{r['rows']}:{r['draw']}": (r["layer"], r["step"]) for r in dry_run(*NODES)}
    assert found == NODES


def test_the_launches_of_a_step_with_prompts_are_counted() -> None:
    """A decode row costs one launch a layer more than a prompt alone, and nothing else by the layer.

    A small step is a graph a layer, and what attends: 16 layers of Llama-3.2-1B cost less than 60 launches.
    """
    alone, beside = (r for r in dry_run(*NODES) if r["name"] == "llama-3.2-1b" and r["draw"] == "plain")
    assert (alone["mixed_layer"], beside["mixed_layer"]) == ([9, 2], [10, 3])
    assert [16 * r["mixed_layer"][1] + r["mixed_step"][1] for r in (alone, beside)] == [42, 60]


def test_the_kernels_that_a_model_needs_are_named() -> None:
    """Of what a kit for it is built."""
    modules = set(dry_run(*NODES)[0]["modules"])
    assert any(name.startswith("xqa_") and "head_dim_64" in name for name in modules), modules
    assert any(name.startswith("batch_prefill_") and name.endswith("_sm90") for name in modules)
    assert "sampling" not in modules, "filters are ours"
    (latents,) = dry_run("deepseek-v2-lite:1:plain")
    (name,) = latents["modules"]
    assert name.startswith("batch_mla_attention_") and "ckv_512_head_dim_kpe_64" in name and name.endswith("_sm90")
