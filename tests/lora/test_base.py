"""The base's own numbers, read back from every form that a layer may have, and heads that adapters bring."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.lora.base import base_rows
from engine.models.loading.adapted import AdaptedLayers
from engine.ops import native
from engine.ops.mxfp4 import Mxfp4Linear
from tests.lora.support import IDS, read, save, wrapped
from tests.models.support import SIZES, Runner, load, make_checkpoint, relative_error

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int4": {"quantisation": "int4"},
    "int8": {"quantisation": "int8"},
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_those_that_it_multiplies_by(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", num_hidden_layers=1, hidden_size=96, intermediate_size=160)
    with torch.inference_mode():
        for kernels in (True, False):
            if not kernels and "quantisation" in FORMS[name]:
                continue
            if kernels:
                model = load(tmp_path, **FORMS[name], max_adapters=1)
            else:
                with native.disabled():
                    model = load(tmp_path, **FORMS[name], max_adapters=1)
            assert isinstance(model.adapted, AdaptedLayers)
            linear = model.adapted.places["model.layers.0.self_attn.k_proj"].linear
            rows = base_rows(linear, torch.tensor([0, 3, linear.out_features - 1]))
            assert rows is not None
            columns = linear(torch.eye(96, dtype=linear.dtype)).T.float()[[0, 3, linear.out_features - 1]]
            assert relative_error(rows, columns) < 1e-4


def test_rows_of_four_bit_floats() -> None:
    blocks = torch.randint(0, 256, (7, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (7, 2), dtype=torch.uint8)
    linear = Mxfp4Linear(blocks, scales, torch.zeros(7))
    rows = base_rows(linear, torch.arange(7))
    assert rows is not None and torch.equal(rows, linear(torch.eye(64)).T)


def test_a_classifier_of_the_adapters_own(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2}, num_labels=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.LlamaForSequenceClassification(config).eval()
        reference.save_pretrained(tmp_path / "base")
    with torch.inference_mode():
        base = reference(torch.tensor([IDS])).logits
        adapted = wrapped(reference, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        save(adapted, tmp_path / "adapter")
        expected = adapted(torch.tensor([IDS])).logits
        model = load(tmp_path / "base", max_adapters=1)
        assert model.adapted is not None
        model.adapted.put(1, read(tmp_path / "adapter", model).branches)
        got = []
        for index in (0, 1):
            model.adapted.rows.use(index)
            got.append(model.classify(Runner(model, num_seqs=1).step({0: IDS})[-1:].float()))
    assert relative_error(got[0], base) < 1e-4 and relative_error(got[1], expected) < 1e-4
    assert relative_error(base, expected) > 0.01
