"""OpenTelemetry spans: one for each sequence, made as it ends, under the attribute names that vLLM uses.

`--otlp-traces-endpoint`; needs the extra [otel]. The SDK's own thread sends them in batches, so the loop pays for the
making alone. Over gRPC, or where OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says http/protobuf over HTTP.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from engine.config import StartupError
from engine.request import Request
from engine.stream import TokenStream

PROTOCOLS = ("grpc", "http/protobuf")
# What a client says of the trace that its request is part of.
TRACE_HEADERS = ("traceparent", "tracestate")
_LARGEST_HEADER = 512


def _protocol() -> str:
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")


def check(endpoint: str) -> None:
    """Raises StartupError without the packages, or for an endpoint that is none."""
    protocol = _protocol()
    if protocol not in PROTOCOLS:
        raise StartupError(
            f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is {protocol!r}, which is none of {', '.join(PROTOCOLS)}"
        )
    if not re.fullmatch(r"(https?://)?[^\s/:]+(:\d{1,5})?(/\S*)?", endpoint):
        raise StartupError(f"--otlp-traces-endpoint: {endpoint!r} is no URL")
    if protocol == "http/protobuf" and "://" not in endpoint:
        raise StartupError(f"--otlp-traces-endpoint: {endpoint!r} must begin with http:// or https://")
    module = "grpc" if protocol == "grpc" else "http"
    try:
        importlib.import_module(f"opentelemetry.exporter.otlp.proto.{module}.trace_exporter")
        importlib.import_module("opentelemetry.sdk.trace.export")
    except ImportError as error:
        raise StartupError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error.name} is missing): pip install 'oneloop[otel]'"
        ) from None


class Spans:
    """Raises StartupError as `check` does. model_name: the served one's."""

    def __init__(self, endpoint: str, model_name: str) -> None:
        check(endpoint)
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "oneloop")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(_protocol(), endpoint)))
        self._tracer = self._provider.get_tracer("oneloop")
        self._kind = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR
        self._extract = TraceContextTextMapPropagator().extract
        self._model_name = model_name

    def ended(self, request: Request, stream: TokenStream, clock: float, headers: Mapping[str, str]) -> None:
        """clock: the engine's, now. headers: TRACE_HEADERS that the client sent."""
        offset = time.time_ns() - int(clock * 1e9)
        finished = clock if stream.finished_at is None else stream.finished_at
        span = self._tracer.start_span(
            "llm_request",
            context=self._extract(headers) if headers else None,
            kind=self._kind,
            attributes=attributes(request, stream, finished, self._model_name),
            start_time=offset + int(stream.arrived_at * 1e9),
        )
        if stream.failed:
            span.set_status(self._error)
        span.end(end_time=offset + int(finished * 1e9))

    def close(self) -> None:
        """Send what is left; blocks for as long as the exporter's own timeouts."""
        self._provider.shutdown()


def _exporter(protocol: str, endpoint: str) -> Any:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HTTPExporter

    return HTTPExporter(endpoint=endpoint)


def attributes(request: Request, stream: TokenStream, finished: float, model_name: str) -> dict[str, Any]:
    """vLLM's; those without a value are left out. Times in seconds."""
    sampling, first, admitted = request.sampling, stream.first_token_at, stream.admitted_at
    found = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.response.model": model_name,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.n": 1,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": stream.num_prompt_tokens,
        "gen_ai.usage.cached_tokens": stream.num_cached_tokens,
        "gen_ai.usage.completion_tokens": stream.num_output_tokens,
        "gen_ai.latency.e2e": finished - stream.arrived_at,
        "gen_ai.latency.time_in_queue": None if admitted is None else admitted - stream.arrived_at,
        "gen_ai.latency.time_to_first_token": None if first is None else first - stream.arrived_at,
        "gen_ai.latency.time_in_model_prefill": None if first is None or admitted is None else first - admitted,
        "gen_ai.latency.time_in_model_decode": None if first is None else finished - first,
        "gen_ai.latency.time_in_model_inference": None if admitted is None else finished - admitted,
    }
    return {name: value for name, value in found.items() if value is not None}


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """TRACE_HEADERS of a request, those of a sane length."""
    found = {name: headers.get(name, "") for name in TRACE_HEADERS}
    return {name: value for name, value in found.items() if 0 < len(value) <= _LARGEST_HEADER}
