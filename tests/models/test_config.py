"""config.json and generation_config.json: both forms of rope, defaults, and one line for everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import StartupError
from engine.models.generation import GenerationDefaults
from engine.models.registry import FAMILIES, read_spec
from engine.models.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "torch_dtype": "float16",
    "eos_token_id": [2, 3],
    "bos_token_id": 1,
}

GEMMA4 = {
    "architectures": ["Gemma4ForCausalLM"],
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
}
LAGUNA = {"architectures": ["LagunaForCausalLM"], "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}


def read(directory: Path, **changes: Any) -> ModelSpec:
    values = {name: value for name, value in (LLAMA | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return read_spec(directory)


def test_reads_what_it_says(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (16, 2, "float16")
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 3), 1)
    assert (config.ropes[0].kind, config.ropes[0].theta, config.ropes[0].rotary_dim) == ("default", 10000.0, 16)
    assert config.windows == (None, None)
    assert config.context_length == 128
    assert read(tmp_path, num_key_value_heads=...).num_kv_heads == 4
    assert read(tmp_path, torch_dtype=...).dtype == "bfloat16"
    assert read(tmp_path, torch_dtype=..., dtype="float32").dtype == "float32"
    for given, expected in (
        ("auto", "bfloat16"),
        ("torch.float32", "float32"),
        ("half", "float16"),
        (None, "bfloat16"),
    ):
        assert read(tmp_path, torch_dtype=given).dtype == expected


def test_both_forms_of_rope_agree(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    older = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    newer = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert older.ropes == newer.ropes
    assert older.ropes[0].kind == "llama3"


def test_yarn_context(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = read(tmp_path, rope_scaling=yarn)
    assert config.context_length == 512
    assert config.ropes[0].attention_scaling == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("window", "expected"), [(None, None), (16, 16), (128, None), (4096, None)], ids=["null", "16", "context", "long"]
)
def test_window(tmp_path: Path, window: int | None, expected: int | None) -> None:
    config = read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=window)
    assert config.windows == (expected, expected)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "default-heads": (
        {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": ...},
        "num_key_value_heads (32), the default of this class, must divide num_attention_heads (4)",
    ),
    "mistyped": ({"vocab_size": "many"}, 'vocab_size must be an integer from 1 to 2147483647, not "many"'),
    "boolean": ({"num_hidden_layers": True}, "num_hidden_layers must be an integer from 1 to 100000, not true"),
    "negative": ({"hidden_size": -64}, "hidden_size must be an integer from 1 to 2147483647, not -64"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1 to 2147483647, not 0"),
    "huge": ({"hidden_size": 10**12}, "hidden_size must be an integer from 1 to 2147483647, not 1000000000000"),
    "kv-heads": ({"num_key_value_heads": 3}, "num_key_value_heads (3) must divide num_attention_heads (4)"),
    "heads": ({"num_attention_heads": 6}, "num_attention_heads (6) must divide hidden_size (64)"),
    "odd-head": ({"head_dim": 15}, "head_dim (15) leaves 15 rotary dimensions; they must be even"),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps must be a finite number of at least 0 and at most 1, not -1"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number"),
    "overflow": ({"rope_theta": 10**400}, "rope_theta must be a finite number above 0, not 1000"),
    "flag": ({"attention_bias": "yes"}, 'attention_bias must be true or false, not "yes"'),
    "dtype": ({"torch_dtype": "int8"}, 'torch_dtype must be one of bfloat16, float16, float32, not "int8"'),
    "activation": ({"hidden_act": "relu"}, 'hidden_act must be one of silu, swish, gelu_pytorch_tanh, not "relu"'),
    "eos": ({"eos_token_id": "</s>"}, 'eos_token_id must be a token id or a list of token ids, not "</s>"'),
    "no-architecture": ({"architectures": ...}, "architectures and model_type are missing: one of them must name"),
    "architectures": ({"architectures": "llama"}, "architectures must be a list with the name of the model class"),
    "model-type": ({"architectures": None, "model_type": 3}, "model_type must be text, not 3"),
    "other-type": (
        {"architectures": None, "model_type": "t5"},
        "model_type t5 is not supported; supported are: AXK1ForCausalLM, ",
    ),
    "classifier": (
        {"architectures": ["LlamaForMultipleChoice"], "model_type": "llama"},
        "architectures LlamaForMultipleChoice is not supported; supported are: ",
    ),
    "text-part": (
        {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "text_config": {}},
        "architectures MllamaForConditionalGeneration is not supported; supported are: ",
    ),
    "text-part-type": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {"model_type": "opt"},
        },
        'text_config.model_type ("opt") is not supported as the text part; supported are: afmoe, ',
    ),
    "text-part-number": (
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": {"model_type": 3}},
        "text_config.model_type must be text",
    ),
    "text-part-list": (
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": []},
        "text_config must be an object, not []",
    ),
    "text-part-field": (
        {"model_type": "gemma3", "architectures": None, "text_config": {"head_dim": 0}},
        "text_config.head_dim must be an integer from 1 to 2147483647, not 0",
    ),
    "text-part-quantized": (
        {
            "model_type": "gemma3",
            "architectures": None,
            "text_config": {"quantization_config": {}},
        },
        'text_config.quantization_config ("unknown") is not supported',
    ),
    "text-part-classifier": (
        {"architectures": ["Qwen2VLForSequenceClassification"], "model_type": "qwen2_vl"},
        "architectures Qwen2VLForSequenceClassification is not supported; supported are: ",
    ),
    "text-part-unknown": (
        {"architectures": ["XForConditionalGeneration"], "model_type": "x", "text_config": {"model_type": "y"}},
        "architectures XForConditionalGeneration is not supported; supported are: ",
    ),
    "causal": (
        {"architectures": ["MistralForCausalLM"], "is_causal": None, "sliding_window": 9},
        "is_causal asks for attention to later tokens, which is not supported with windows",
    ),
    "relative-positions": (
        {"architectures": ["BertModel"], "position_embedding_type": "relative_key"},
        'position_embedding_type must be one of absolute, not "relative_key"',
    ),
    "causal-encoder": ({"architectures": ["BertModel"], "is_decoder": True}, "is_decoder is true, which is not"),
    "encoder-task": (
        {"architectures": ["BertForMultipleChoice"], "model_type": "bert"},
        "architectures BertForMultipleChoice is not supported; supported are: BertModel, ",
    ),
    "no-positions": (
        {"architectures": ["RobertaModel"], "max_position_embeddings": 2, "pad_token_id": 1},
        "max_position_embeddings (2) must be more than pad_token_id + 1 (2)",
    ),
    "nomic-switch": (
        {"architectures": ["NomicBertModel"], "prenorm": True},
        "prenorm must be False: other models of this class are not supported",
    ),
    "labels": (
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {"1": "a"}},
        "id2label has no label for 0",
    ),
    "head-activation": (
        {"architectures": ["LlamaForSequenceClassification"], "sentence_transformers": {"activation_fn": "x.Mish"}},
        'sentence_transformers.activation_fn ("x.Mish") must be one of Identity, Sigmoid, Softmax',
    ),
    "bidirectional-any": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    "per-layer": ({"per_layer_config": {"1": {"num_attention_heads": 2}}}, "per_layer_config is not supported"),
    "compressed": (
        {"compression_config": {"quant_method": "sparse", "format": "pack-quantized"}},
        'compression_config ("sparse, pack-quantized") is not supported',
    ),
    "quantized-untold": ({"quantization_config": {}}, 'quantization_config ("unknown") is not supported'),
    "architecture": ({"architectures": ["XModel"]}, "architectures XModel is not supported; supported are: "),
    "quantized": (
        {"quantization_config": {"quant_method": "aqlm"}},
        'quantization_config ("aqlm") is not supported; supported are: auto-round, awq, ',
    ),
    "rope-kind": (
        {"rope_scaling": {"type": "su"}},
        'rope_scaling.type must be one of default, linear, dynamic, llama3, yarn, longrope, proportional, not "su"',
    ),
    "rope-kind-newer": ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be one of default"),
    "rope-form": ({"rope_scaling": "linear"}, 'rope_scaling must be an object, not "linear"'),
    "rope-factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "rope-small": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "rope_scaling.factor must be a finite number of at least 1, not 0.5",
    ),
    "rope-theta": ({"rope_theta": 0}, "rope_theta must be a finite number above 0, not 0"),
    "rope-list": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0]}},
        "rope_scaling.long_factor must be a list of 8 numbers, not of 1",
    ),
    "llama3-order": (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "rope_scaling.high_freq_factor must be a finite number above 4, not 4",
    ),
    "layer-types": (
        {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]},
        "layer_types must be a list of num_hidden_layers = 2 entries, not 1 entries",
    ),
    "layer-type": (
        {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention", "chunked_attention"]},
        'layer_types must hold full_attention or sliding_attention, not "chunked_attention"',
    ),
    "window": ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window must be an integer"),
    "softcap": (
        {"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 0},
        "final_logit_softcapping must be a finite number above 0, not 0",
    ),
    "bidirectional": (
        {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": "vision"},
        "use_bidirectional_attention is not supported",
    ),
    "experts": (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
        "num_experts_per_tok (3) must not exceed num_local_experts (2)",
    ),
    "plain-layers": (
        {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [1.5]},
        "mlp_only_layers must be a list of integers, not [1.5]",
    ),
    "partial-rotary": (
        {"architectures": ["Glm4ForCausalLM"], "head_dim": 16, "partial_rotary_factor": 1.5},
        "partial_rotary_factor must be a finite number above 0 and at most 1, not 1.5",
    ),
    "gemma4-both-ways": ({**GEMMA4, "use_bidirectional_attention": "all"}, "use_bidirectional_attention (all) is not"),
    "gemma4-all-shared": ({**GEMMA4, "num_kv_shared_layers": 2}, "num_kv_shared_layers (2) must be below num_hidden"),
    "gemma4-nothing-to-read": (
        {**GEMMA4, "num_kv_shared_layers": 1},
        "num_kv_shared_layers (1) leaves no layer with full_attention to read from",
    ),
    "gemma4-layer-sizes": (
        {**GEMMA4, "per_layer_config": {"1": {"head_dim": 16, "hidden_size": 8}}},
        "per_layer_config.1.hidden_size is not supported: head_dim and num_key_value_heads of a layer are",
    ),
    "gemma4-layer-size": (
        {**GEMMA4, "per_layer_config": {"0": {"head_dim": "wide"}}},
        'per_layer_config.0.head_dim must be an integer from 1 to 2147483647, not "wide"',
    ),
    "gemma4-layer-list": ({**GEMMA4, "per_layer_config": [8]}, "per_layer_config must be an object, not [8]"),
    "gemma4-head": ({**GEMMA4, "head_dim": 7}, "head_dim (7) leaves 7 rotary dimensions; they must be even"),
    "gemma4-kv-heads": (
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 3},
        "num_attention_heads (4) must be a multiple of a layer's 3 KV heads",
    ),
    "gemma4-inputs": (
        {**GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99},
        "vocab_size_per_layer_input (99) must not be below vocab_size",
    ),
    "gemma4-experts": (
        {**GEMMA4, "enable_moe_block": True, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 8},
        "top_k_experts (3) must not exceed num_experts (2)",
    ),
    "cohere2-no-window": (
        {"architectures": ["Cohere2ForCausalLM"], "sliding_window": None},
        "sliding_window must be a number of tokens in this class, not null",
    ),
    "laguna-heads": (
        {**LAGUNA, "num_attention_heads_per_layer": [4, 3]},
        "num_attention_heads_per_layer (3) must be a multiple of num_key_value_heads",
    ),
    "laguna-heads-count": (
        {**LAGUNA, "num_attention_heads_per_layer": [4]},
        "num_attention_heads_per_layer must have num_hidden_layers = 2 entries, not 1",
    ),
    "laguna-gate": ({**LAGUNA, "gating": "per-layer"}, 'gating must be true, per-head or per-element, not "per-layer"'),
    "mimo-kv-heads": (
        {"architectures": ["MiMoV2FlashForCausalLM"], "num_key_value_heads": 4},
        "num_key_value_heads (4), doubled, must divide num_attention_heads",
    ),
    "mimo-pattern": (
        {"architectures": ["MiMoV2FlashForCausalLM"], "hybrid_layer_pattern": [0, 2]},
        "hybrid_layer_pattern must hold 0 or 1 for each of num_hidden_layers = 2 layers",
    ),
    "mimo-heads": (
        {"architectures": ["MiMoV2FlashForCausalLM"], "swa_num_key_value_heads": 2},
        "swa_num_key_value_heads must be 4 in this class, not 2",
    ),
    "layer-theta": (
        {"architectures": ["GraniteSWAForCausalLM"], "layer_rope_theta": [0, "far"]},
        'layer_rope_theta must be a finite number of at least 0, not "far"',
    ),
    "layer-thetas": (
        {"architectures": ["GraniteSWAForCausalLM"], "layer_rope_theta": 5},
        "layer_rope_theta must be a list of num_hidden_layers = 2 numbers",
    ),
    "muse-theta": (
        {
            "architectures": ["MuseGlimmerForConditionalGeneration"],
            "text_config": {**LLAMA, "layer_rope_theta": [[], 0]},
        },
        "text_config.layer_rope_theta must hold 0 or 10000 for each of 2 layers",
    ),
    "phimoe-mscale": (
        {
            "architectures": ["PhimoeForCausalLM"],
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "short_mscale": 1.1,
                "long_mscale": 1.2,
            },
        },
        "rope_scaling.long_mscale (1.2) is not short_mscale (1.1), which is not supported",
    ),
    "minicpm-sparse": (
        {"architectures": ["MiniCPMForCausalLM"], "sparse_config": {"topk": 64}},
        "sparse_config is not supported: with null in its place attention is to all tokens",
    ),
    "gte-mixed": (
        {"architectures": ["NewModel"], "rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.5}},
        "rope_scaling.mixed_b is not supported",
    ),
    "nested-rope": (
        {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"sliding_attention": {"rope_type": "spiral"}}},
        "rope_parameters.sliding_attention.rope_type must be one of default",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_field(name: str, tmp_path: Path) -> None:
    changes, expected = BAD[name]
    with pytest.raises(StartupError) as caught:
        read(tmp_path, **changes)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: {expected}")
    assert "\n" not in message


def test_unknown_architecture_lists_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(StartupError) as caught:
        read(tmp_path, architectures=["XModel"])
    assert all(name in str(caught.value) for name in (*FAMILIES, "BertModel"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file; is this a model directory?"),
        ("{", "is not valid JSON: "),
        ("[" * 100_000, "is not valid JSON: "),
        ("\xff", "is not valid JSON: "),
        ("[1]", "must hold a JSON object, not [1]"),
    ],
    ids=["missing", "cut", "deep", "encoding", "list"],
)
def test_bad_file(text: str | None, expected: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(StartupError) as caught:
        read_spec(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {expected}")
    assert "\n" not in str(caught.value)


def test_generation_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "do_sample": False,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "min_p": None,
                "repetition_penalty": 1.05,
                "max_new_tokens": 2048,
                "eos_token_id": [5, 6],
                "transformers_version": "4.37.0",
            }
        )
    )
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(0.7, 0.8, 20, None, 1.05, 2048, (5, 6))
    path.write_text('{"eos_token_id": 7, "top_k": -1}')
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(top_k=0, eos_token_ids=(7,))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -1, "must be a finite number of at least 0, not -1"),
        ("temperature", "hot", 'must be a finite number of at least 0, not "hot"'),
        ("top_p", 0, "must be a finite number above 0 and at most 1, not 0"),
        ("min_p", 2, "must be a finite number of at least 0 and at most 1, not 2"),
        ("top_k", 1.5, "must be an integer from -1 to 2147483647, not 1.5"),
        ("repetition_penalty", 0, "must be a finite number above 0, not 0"),
        ("max_new_tokens", 0, "must be an integer from 1 to 2147483647, not 0"),
        ("eos_token_id", [1, "x"], 'must be a token id or a list of token ids, not "x"'),
    ],
)
def test_bad_generation_defaults(name: str, value: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(StartupError) as caught:
        GenerationDefaults.load(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'generation_config.json'}: {name} {expected}"


def test_configs_need_no_torch(tmp_path: Path) -> None:
    """The server reads a config before the executor, and `--help`, load torch."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    script = (
        "import sys; from pathlib import Path; from engine.models.registry import read_spec;"
        "import engine.models.hub, engine.models.generation, engine.models.loading.checkpoint;"
        f"read_spec(Path({str(tmp_path)!r}));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'huggingface_hub', 'safetensors')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
