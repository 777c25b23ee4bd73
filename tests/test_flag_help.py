"""What --help says of defaults is what applies without the flag."""

from __future__ import annotations

import re

import pytest

from engine.flags import make_parser, parse

# What has none: names of files and of what is served, limits that are off, and what goes by the model or the machine.
WITHOUT = {
    *(
        "model",
        "model_positional",
        "tokenizer",
        "revision",
        "download_dir",
        "served_model_name",
        "chat_template",
        "seed",
    ),
    *("sampling_defaults", "task", "score_tokens", "threads", "kv_cache_memory_bytes", "memory_fraction", "num_pages"),
    *("max_total_tokens", "kernels", "profile_dir", "ttft_slo", "max_queue_wait", "queue_timeout", "request_timeout"),
    *("lora_modules", "max_loras_per_batch", "kv_transfer_config", "kv_disk", "api_key", "admin_api_key", "key_file"),
    *("ssl_certfile", "ssl_keyfile", "weights_root", "max_host_memory", "resume_journal", "handover", "root_path"),
    *("default_chat_template_kwargs", "isolate_api_keys", "access_log", "debug_faults", "devices", "trace_file"),
    *("prices", "otlp_traces_endpoint", "kv_events_config", "lora_eviction_policy", "kv_host_gb"),
}


def test_every_flag_that_has_a_default_tells_it() -> None:
    silent = {
        action.dest
        for action in make_parser()._actions
        if action.nargs != 0
        and "default" not in (action.help or "")
        and not action.dest.startswith("speculative_")  # those of SGLang; vLLM's object has them
    }
    assert silent <= WITHOUT, f"neither is a default told, nor listed here why not: {silent - WITHOUT}"


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--port", "8000"),
        ("--host", "127.0.0.1"),
        ("--drain-timeout", "30"),
        ("--max-body-bytes", "8M"),
        ("--response-store-size", "1000"),
        ("--sse-keep-alive-interval", "15"),
        ("--max-num-seqs", "256"),
        ("--page-size", "16"),
        ("--max-connections-per-address", "0"),
        ("--max-logprobs", "20"),
        ("--kv-cache-dtype", "auto"),
        ("--generation-config", "auto"),
        ("--stall-action", "report"),
        ("--log-level", "info"),
        ("--cuda-graph", "lazy"),
    ],
)
def test_the_default_that_is_told_changes_nothing(flag: str, default: str) -> None:
    (action,) = [action for action in make_parser()._actions if flag in action.option_strings]
    assert re.search(rf"\(default: {default}\)$", action.help or ""), action.help
    assert parse([flag, default]) == parse([])
