"""Bytes to a port and back, as no library would send them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress


def exchange(port: int, parts: Sequence[bytes], timeout_s: float) -> bytes:
    """What comes back until the service has nothing more to say: it hangs up, or has answered and waits.

    Raises: `TimeoutError` when nothing comes at all.
    """
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with suppress(ConnectionError):  # it has heard enough
            for part in parts:
                connection.sendall(part)
        with suppress(ConnectionError):
            while piece := connection.recv(2**16):
                said += piece
                if _is_answered(said):
                    connection.settimeout(0.2)  # another answer would have to come at once
                    with suppress(TimeoutError):
                        while piece := connection.recv(2**16):
                            said += piece
                    return said
    return said


def _is_answered(said: bytes) -> bool:
    """Whether a whole answer of HTTP/1.1 is there."""
    head, end, body = said.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        return _is_answered(body)
    length = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(end and length) and len(body) >= int(length[0])


def leave(port: int, sent: bytes, *, reset: bool) -> None:
    """Send that and go, by a reset of the connection if wished."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        time.sleep(0.05)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# --- HTTP/2 --------------------------------------------------------------------------------------------------
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header, literally and without an index."""
    return b"\0" + _text(name) + _text(value)


def _text(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, length = len(text) - 127, [127]
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + text


def headers(path: bytes | None, **changes: bytes | None) -> bytes:
    """Those of a call of gRPC; None leaves one out."""
    fields: dict[bytes, bytes | None] = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"x",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    for name, value in changes.items():
        fields[(b":" if name == "method" else b"") + name.replace("_", "-").encode()] = value
    return b"".join(field(name, value) for name, value in fields.items() if value is not None)


def ping() -> bytes:
    """A question that a healthy connection answers."""
    return frame(PING, 0, 0, b"areuthere"[:8])


PONG = frame(PING, 1, 0, b"areuthere"[:8])


def speak(port: int, sent: bytes, timeout_s: float) -> tuple[list[tuple[int, int]], bool]:
    """Kinds and streams of the frames that came, and whether the service has hung up; else it has answered a ping."""
    said, has_hung_up = b"", False
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        try:
            connection.sendall(sent)
            connection.sendall(ping())
            while PONG not in said:
                piece = connection.recv(2**16)
                said += piece
                if not piece:
                    has_hung_up = True
                    break
            else:
                said += _what_follows(connection)
        except ConnectionError:
            has_hung_up = True
    return list(_frames(said)), has_hung_up


def _what_follows(connection: socket.socket) -> bytes:
    connection.settimeout(0.3)
    said = b""
    with suppress(TimeoutError):
        while piece := connection.recv(2**16):
            said += piece
    return said


def _frames(said: bytes) -> list[tuple[int, int]]:
    found, at = [], 0
    while at + 9 <= len(said):
        (length,) = struct.unpack(">I", b"\0" + said[at : at + 3])
        found.append((said[at + 3], struct.unpack(">I", said[at + 5 : at + 9])[0]))
        at += 9 + length
    return found
