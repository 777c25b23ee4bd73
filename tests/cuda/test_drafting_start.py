"""What drafts on a GPU comes to be at start: read onto the device, measured, told; and one line for what cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import Built, build_engine
from engine.config import (
    CacheOptions,
    EngineConfig,
    LoraOptions,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    StartupError,
    StreamOptions,
)
from engine.executor import cuda_start
from engine.ops import native
from tests.cuda.fake_device import FakeDevice
from tests.models.support import make_checkpoint
from tests.speculation import test_mtp as mtp
from tests.speculation.test_eagle3 import write_head
from tests.speculation.test_start import answers, write_tokenizer

VOCABULARY = {f"t{index}": index for index in range(211)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch says that there is one, and what asks for it gets the fake device."""
    for name, answer in {
        "is_available": lambda: True,
        "get_device_name": lambda *args: "NVIDIA Rehearsal",
        "get_device_capability": lambda *args: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(cuda_start, "CudaDevice", lambda number, nvtx: FakeDevice(1, 0.3))
    with native.disabled():
        yield


def build(target: Path, *, lora: bool = False, **options: Any) -> Built:
    return build_engine(
        EngineConfig(
            model=ModelOptions(path=str(target), dtype="float32", max_model_len=128),
            cache=CacheOptions(num_pages=64),
            scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=64),
            stream=StreamOptions(flush_interval_ms=0.0),
            device="cuda",
            speculation=SpeculationOptions(**options),
            lora=LoraOptions(enable=lora),
        )
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("method", ["draft_model", "eagle3", "mtp", "ngram"])
async def test_what_drafts_on_a_gpu(method: str, tmp_path: Path) -> None:
    target, head = tmp_path / "target", tmp_path / "head"
    options: dict[str, Any] = {"method": method, "num_draft_tokens": 3, "adaptive": False}
    if method == "mtp":
        mtp.write(target, "mimo")
    else:
        make_checkpoint(target, "Llama")
        write_tokenizer(target, VOCABULARY)
    if method == "eagle3":
        write_head(head, "speculators")
        options["model"] = str(head)
    elif method == "draft_model":
        make_checkpoint(head, "Qwen3", seed=1, hidden_size=32, num_hidden_layers=1, head_dim=8)
        write_tokenizer(head, VOCABULARY)
        options["model"] = str(head)
    expected = await answers(build(target))
    built = build(target, **options)
    rows = dict(built.report.rows)
    assert ("drafting" in rows) == (method != "ngram")
    if method != "ngram":
        assert rows["drafting"].startswith("up to 3 a row, ") and str(tmp_path) in rows["draft model"]
    assert await answers(built) == expected


@pytest.mark.usefixtures("gpu")
def test_what_cannot_be(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "target", "Llama")
    write_tokenizer(tmp_path / "target", VOCABULARY)
    write_head(tmp_path / "head", "plain", target_hidden_size=64)

    def refused(pattern: str, **options: Any) -> None:
        with pytest.raises(StartupError, match=pattern) as caught:
            build(tmp_path / "target", num_draft_tokens=2, **options)
        assert "\n" not in str(caught.value)

    refused(r"target_hidden_size \(64\) is not the model's", method="eagle3", model=str(tmp_path / "head"))
    write_head(tmp_path / "head", "plain")
    refused(r"\(eagle3\) cannot be used with --enable-lora", method="eagle3", model=str(tmp_path / "head"), lora=True)
    refused(r"\(mtp\) cannot be used with LlamaForCausalLM", method="mtp")
    refused(r"draft_model' needs a model", method="draft_model")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("method", ["ngram", "mtp"])
async def test_drafts_for_a_model_with_a_recurrent_state(method: str, tmp_path: Path) -> None:
    mtp.write(tmp_path, "qwen")
    expected = await answers(build(tmp_path))
    built = build(tmp_path, method=method, num_draft_tokens=3, adaptive=False)
    rows = dict(built.report.rows)
    assert "snapshots" in rows["states"] and rows["steps with drafts"].startswith("up to ")
    assert await answers(built) == expected
