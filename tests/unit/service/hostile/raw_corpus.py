"""Bytes that no client should send to the ports of HTTP and of gRPC, by name."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.unit.service.hostile.http_corpus import body
from tests.unit.service.hostile.service import GENERATE
from tests.unit.service.hostile.sockets import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    field,
    frame,
    headers,
)


@dataclass(frozen=True)
class Raw:
    statuses: Sequence[int]
    """Of the answers, in order."""
    sent: Sequence[bytes]


GOOD = body()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
HIDDEN_REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LENGTH = b"Content-Length: %d" % len(GOOD)
TE = b"Transfer-Encoding: chunked"
POST = b"POST /v1/completions HTTP/1.1"


def post(*lines: bytes, content: bytes = GOOD, line: bytes = POST) -> bytes:
    given = (line, b"Host: localhost", b"Content-Type: application/json", *lines)
    return b"\r\n".join(given) + b"\r\n\r\n" + content


def get(target: bytes = b"/health", *lines: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join((b"GET %s %s" % (target, version), b"Host: localhost", *lines)) + b"\r\n\r\n"


ONE: dict[str, tuple[int, bytes]] = {
    # Where does it end?
    "length and chunked": (400, post(LENGTH, TE, content=CHUNKED + HIDDEN_REQUEST)),
    "chunked and length": (400, post(TE, LENGTH, content=CHUNKED + HIDDEN_REQUEST)),
    "chunked and length 0": (400, post(TE, b"Content-Length: 0", content=CHUNKED + HIDDEN_REQUEST)),
    "both, for what needs no body": (400, get(b"/health", TE, b"Content-Length: 5") + b"0\r\n\r\n" + HIDDEN_REQUEST),
    "chunked in HTTP/1.0": (400, post(TE, content=CHUNKED + HIDDEN_REQUEST, line=POST[:-1] + b"0")),
    "chunked twice": (400, post(TE, TE, content=CHUNKED)),
    "chunked, and then not": (400, post(TE, b"Transfer-Encoding: identity", content=CHUNKED)),
    "chunked after gzip": (400, post(b"Transfer-Encoding: gzip, chunked", content=CHUNKED)),
    "xchunked": (400, post(LENGTH, b"Transfer-Encoding: xchunked")),
    "a space before the colon": (400, post(LENGTH, b"Transfer-Encoding : chunked")),
    "a vertical tab before chunked": (400, post(b"Transfer-Encoding: \x0bchunked", content=CHUNKED)),
    "two lengths": (400, post(LENGTH, b"Content-Length: 5")),
    "a list of lengths": (400, post(b"Content-Length: %d, 5" % len(GOOD))),
    "length -1": (400, post(b"Content-Length: -1")),
    "length +5": (400, post(b"Content-Length: +5")),
    "length 0x2c": (400, post(b"Content-Length: 0x2c")),
    "length 1e3": (400, post(b"Content-Length: 1e3")),
    "length in Arabic digits": (400, post("Content-Length: ٤٤".encode())),
    "length of 5,000 digits": (400, post(b"Content-Length: " + b"9" * 5000)),
    "length 10^12": (413, post(b"Content-Length: 1000000000000")),
    "no length": (400, post(content=b"")),
    "chunk size zz": (400, post(TE, content=b"zz\r\nab\r\n")),
    "chunk size -5": (400, post(TE, content=b"-5\r\nabcde\r\n")),
    "chunk size 0x5": (400, post(TE, content=b"0x5\r\nabcde\r\n0\r\n\r\n")),
    "chunk size after a space": (400, post(TE, content=b" 5\r\nabcde\r\n0\r\n\r\n")),
    "chunk size of 30 digits": (400, post(TE, content=b"f" * 30 + b"\r\n")),
    "a chunk longer than it says": (400, post(TE, content=b"5\r\nabcdefgh\r\n0\r\n\r\n")),
    # What is it?
    "HTTP/0.9": (400, b"GET /health\r\n\r\n"),
    "no host": (400, b"GET /health HTTP/1.1\r\n\r\n"),
    "two hosts": (400, get(b"/health", b"Host: y")),
    "a NUL in the path": (400, get(b"/health\0")),
    "a path in UTF-8": (400, get("/ä".encode())),
    "a NUL in a header": (400, get(b"/health", b"X-A: a\0b")),
    "a header without a name": (400, get(b"/health", b": b")),
    "a header without a colon": (400, get(b"/health", b"abc")),
    "a carriage return in a header": (400, get(b"/health", b"X-A: a\rb")),
    "a method of 70 KB": (400, b"A" * 70_000 + b" / HTTP/1.1\r\n\r\n"),
    "20,000 headers": (400, get(b"/health", *[b"x-%d: y" % number for number in range(20_000)])),
    "a header of 1 MB": (400, get(b"/health", b"X: " + b"a" * 1_000_000)),
    "a TLS handshake": (400, bytes.fromhex("16030100a5010000a10303") + bytes(200)),
    "noise": (400, bytes(range(256)) * 10),
    "an SSH greeting": (400, b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "the absolute form": (404, get(b"http://evil/v1/models")),
    "CONNECT": (404, b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "OPTIONS of everything": (404, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "a websocket": (405, get(b"/v1/completions", b"Connection: Upgrade", b"Upgrade: websocket")),
    "an upgrade to HTTP/2": (200, get(b"/health", b"Connection: Upgrade", b"Upgrade: h2c")),
    "a header line that is folded": (200, post(LENGTH, b"X-A: b\r\n c")),
    "the same length twice": (200, post(LENGTH, LENGTH)),
    "HTTP/9.9": (200, get(version=b"HTTP/9.9")),
    "an expectation nobody knows": (200, post(LENGTH, b"Expect: 200-ok")),
}

LATE: dict[str, bytes] = {
    "half a request line": b"GET /hea",
    "half a header": b"GET /health HTTP/1.1\r\nHos",
    "headers without an end": b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": post(LENGTH, content=GOOD[:20]),
    "half a chunk": post(TE, content=b"10\r\nab"),
    "chunks without an end": post(TE, content=b"1\r\n{\r\n" * 100),
    "a body that is promised and never sent": post(LENGTH, b"Expect: 100-continue", content=b""),
}
"""The rest does not come."""

HTTP: dict[str, Raw] = {
    **{name: Raw([status], [sent]) for name, (status, sent) in ONE.items()},
    "the preface of HTTP/2": Raw([403, 400], [PREFACE]),
    "a good request, then noise": Raw([200, 400], [get() + b"NOISE\r\n\r\n"]),
}

SETTLED = PREFACE + frame(SETTINGS, 0, 0)
CALL = headers(GENERATE.encode())
CLOSES, GOES_ON, EITHER = True, False, None


def begin(fields: bytes = CALL, flags: int = END_HEADERS, stream: int = 1) -> bytes:
    return SETTLED + frame(HEADERS, flags, stream, fields)


GRPC: dict[str, tuple[bytes, bool | None]] = {
    "HTTP/1": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", CLOSES),
    "noise": (bytes(range(256)) * 4, CLOSES),
    "a TLS handshake": (bytes.fromhex("16030100a5010000a10303") + bytes(200), CLOSES),
    "the preface, then noise": (PREFACE + b"\xff" * 300, CLOSES),
    "a frame of 16 MiB": (SETTLED + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(100), CLOSES),
    "settings of 3 bytes": (PREFACE + frame(SETTINGS, 0, 0, b"abc"), CLOSES),
    "settings with a frame size of 0": (PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 0)), CLOSES),
    "settings with a window of 2^32 - 1": (PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**32 - 1)), CLOSES),
    "headers that are no HPACK": (begin(b"\xff" * 50, END_HEADERS | END_STREAM), CLOSES),
    "an index of 0": (begin(b"\x80", END_HEADERS | END_STREAM), CLOSES),
    "a continuation of nothing": (SETTLED + frame(CONTINUATION, END_HEADERS, 1, CALL), CLOSES),
    "headers interrupted by data": (begin(flags=0) + frame(DATA, 0, 1, b"abc"), CLOSES),
    "a window that grows by 0": (SETTLED + frame(WINDOW_UPDATE, 0, 0, bytes(4)), CLOSES),
    "3,000 pings": (SETTLED + frame(PING, 0, 0, bytes(8)) * 3000, EITHER),
    "frames of no kind": (SETTLED + b"".join(frame(kind, 0, 0, b"abc") for kind in range(20, 60)), GOES_ON),
    "data of no stream": (SETTLED + frame(DATA, 0, 1, b"abc"), GOES_ON),
    "an even stream": (begin(stream=2, flags=END_HEADERS | END_STREAM), GOES_ON),
    "a promise": (SETTLED + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4) + CALL), GOES_ON),
    "a stream that depends on itself": (SETTLED + frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 5)), GOES_ON),
    "windows beyond 2^31": (SETTLED + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 3, GOES_ON),
    "3,000 settings": (PREFACE + frame(SETTINGS, 0, 0) * 3000, GOES_ON),
    "a farewell": (SETTLED + frame(GOAWAY, 0, 0, bytes(8)), GOES_ON),
    "GET": (begin(headers(GENERATE.encode(), method=b"GET"), END_HEADERS | END_STREAM), GOES_ON),
    "no path": (begin(headers(None), END_HEADERS | END_STREAM), GOES_ON),
    "HTML": (begin(headers(GENERATE.encode(), content_type=b"text/html"), END_HEADERS | END_STREAM), GOES_ON),
    "a header in capitals": (begin(CALL + field(b"X-A", b"b"), END_HEADERS | END_STREAM), GOES_ON),
    "a NUL in a header": (begin(CALL + field(b"x-a", b"a\0b"), END_HEADERS | END_STREAM), GOES_ON),
    "a deadline of 10^14 hours": (begin(CALL + field(b"grpc-timeout", b"100000000000000H")), GOES_ON),
    "a key that is no text": (begin(CALL + field(b"x-api-key", b"\xff\xfe"), END_HEADERS | END_STREAM), GOES_ON),
    "a message shorter than it says": (begin() + frame(DATA, END_STREAM, 1, b"\0\0\0\0\x64abc"), GOES_ON),
    "a message of 4 GiB": (begin() + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff"), GOES_ON),
    "a message with flag 2": (begin() + frame(DATA, END_STREAM, 1, b"\x02\0\0\0\0"), GOES_ON),
    "gzip that is none": (
        begin(CALL + field(b"grpc-encoding", b"gzip")) + frame(DATA, END_STREAM, 1, b"\1\0\0\0\3abc"),
        GOES_ON,
    ),
    "a coding nobody knows": (
        begin(CALL + field(b"grpc-encoding", b"zstd9")) + frame(DATA, END_STREAM, 1, b"\1\0\0\0\3abc"),
        GOES_ON,
    ),
    "1,000 calls, each reset at once": (
        SETTLED
        + b"".join(
            frame(HEADERS, END_HEADERS, number, CALL) + frame(RST_STREAM, 0, number, bytes([0, 0, 0, 8]))
            for number in range(1, 2001, 2)
        ),
        GOES_ON,
    ),
    "metadata without an end": (
        begin(flags=0) + frame(CONTINUATION, 0, 1, field(b"x", b"y" * 8000)) * 200,
        CLOSES,
    ),
}
"""What is sent, and whether the connection is lost by it. Where it goes on, a ping is answered."""
