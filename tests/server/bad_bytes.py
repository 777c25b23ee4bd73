"""What is malformed before any field is looked at: bodies, their types and encodings, routes. Run by test_errors.py."""

from __future__ import annotations

# Bodies that are no JSON object, for every route that reads one.
RAW: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"}",
    b"[]",
    b"[{}]",
    b"null",
    b"true",
    b'"x"',
    b"5",
    b"{}{}",
    b"{} {}",
    b"{'prompt': 'x'}",
    b"{prompt: 1}",
    b"{1: 2}",
    b'{"prompt"}',
    b'{"prompt":}',
    b'{"prompt" "x"}',
    b'{"prompt": "x"',
    b'{"prompt": "x}',
    b'{"prompt": "x",}',
    b'{,"prompt": "x"}',
    b'{"prompt": [1,]}',
    b'{"prompt": "x"} trailing',
    b'{"prompt": "x"} // comment',
    b'/* comment */ {"prompt": "x"}',
    *(
        b'{"prompt": "x", "temperature": %s}' % number
        for number in (
            b"NaN", b"nan", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"+1", b"01", b".5", b"5.", b"0x10", b"1_0",
            b"1e", b"--1", b"True", b"None", b"undefined", b"1" * 400, b"9" * 400 + b".5",
        )
    ),
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\xc0\xaf"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xf4\x90\x80\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "\\u12"}',
    b'{"prompt": "\\x41"}',
    b'{"\xff": 1}',
    b'{"prompt": "a\nb"}',
    b'{"prompt": "a\x00b"}',
    b'\xef\xbb\xbf{"prompt": "x"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    '{"prompt": "x"}'.encode("utf-16"),
    '{"prompt": "x"}'.encode("utf-32"),
    b"\x00" * 100,
    b"\x1f\x8b" + b"\x00" * 30,
    b"prompt=x&max_tokens=1",
    b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\nx\r\n--x--",
]  # fmt: skip

MEDIA_TYPES = (
    "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonp", "application/json+x", "application/octet-stream", "application", "json", "*/*", "x" * 200,
)  # fmt: skip
ENCODINGS = ("br", "zstd", "compress", "gzip, gzip", "deflate, gzip", "identity, gzip", "utf-8", "*", "x" * 200)
# (method, path, status)
NO_ROUTES: list[tuple[str, str, int]] = [
    *(("GET", path, 404) for path in ("/nowhere", "/v1x", "/v2/models", "/v1/chat", "//", "/v1//models", "/%00")),
    *(
        ("POST", path, 404)
        for path in ("/v1/nowhere", "/v1/completions//", "/V1/completions", "/engines/x/completions")
    ),
    ("GET", "/v1/models/no/such", 404),
    ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd", 404),
    *((method, "/v1/completions", 405) for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE")),
    *((method, "/v1/models", 405) for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS")),
    *(("POST", path, 405) for path in ("/health", "/ready", "/metrics", "/version", "/server_info", "/v1/models/demo")),
    *(
        ("GET", path, 405)
        for path in (
            "/tokenize",
            "/v1/completions/",
            "/completion",
            "/start_profile",
            "/abort_request",
            "/pause",
            "/v1/embeddings",
        )
    ),
]
