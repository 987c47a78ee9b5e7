"""Peers that know the token and speak the protocol badly, by gRPC and by socket, on either side."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ray_moe.errors import WireError
from ray_moe.transport import codec, frames
from ray_moe.transport.grpc_options import METHOD, SERVICE, grpc
from ray_moe.transport.hello import HELLO_ID, PROTOCOL_VERSION, Hello, write_hello
from ray_moe.types import HostAddress
from ray_moe.wire import tensors
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess


def framed(message: bytes, message_id: int = 1) -> bytes:
    return frames.frame(message_id, [message], len(message))


class Intruder(Protocol):
    """Pretends to be a router."""

    def send(self, *messages: bytes, linger: bool = True) -> list[bytes]:
        """The host's answers (after hello) to `messages`, as many as those; or its refusal as `RayMoEError`.

        Without `linger` it goes right after the last message, and hears what the host had to say until then.
        """
        ...

    def close(self) -> None: ...


class GrpcIntruder:
    def __init__(self, host: HostProcess) -> None:
        self._channel = grpc.insecure_channel(host.address.tcp, [("grpc.use_local_subchannel_pool", 1)])
        self._exchange = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)

    def send(self, *messages: bytes, linger: bool = True) -> list[bytes]:
        over = threading.Event()

        def requests() -> Iterator[bytes]:
            yield from messages
            if linger:
                over.wait(30)

        metadata = (("authorization", f"Bearer {TOKEN}"), ("ray-moe-protocol", str(PROTOCOL_VERSION)))
        stream: Any = self._exchange(requests(), metadata=metadata)
        try:
            next(stream)
            return [next(stream) for _ in messages] if linger else list(stream)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            raise WireError(error.details()) from None
        finally:
            over.set()
            stream.cancel()

    def close(self) -> None:
        self._channel.close()


class SocketIntruder:
    def __init__(self, host: HostProcess, hello: bytes | None = None) -> None:
        """Without `hello`, a good one."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect("\0" + host.address.unix)
        self._socket.settimeout(10)
        self._messages = received(self._socket)
        self._hello = (
            framed(write_hello(Hello(TOKEN, PROTOCOL_VERSION, "", None, None)), HELLO_ID) if hello is None else hello
        )

    def send(self, *messages: bytes, linger: bool = True) -> list[bytes]:
        self._socket.sendall(self._hello)
        self._next()
        for message in messages:
            self._socket.sendall(message)
        if not linger:
            self._socket.shutdown(socket.SHUT_WR)
        return [self._next() for _ in messages] if linger else [framed(bytes(m), i) for i, m in self._messages]

    def hear(self) -> bytes:
        """What the host says to the hello alone; empty when it just ends the line."""
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(self._hello)
            with contextlib.suppress(StopIteration):
                return self._next()
        return b""

    def _next(self) -> bytes:
        message_id, message = next(self._messages)
        fields = tensors.decode(message)[0]
        if message_id == HELLO_ID and fields[0] == codec.FAILED and type(fields[0]) is int:
            raise codec.read_failure(fields)
        return framed(bytes(message), message_id)

    def close(self) -> None:
        self._socket.close()


def received(line: socket.socket) -> Iterator[tuple[int, memoryview]]:
    """The messages that come by `line`."""
    stream = frames.ByteStream(2**30)
    while num_bytes := line.recv_into(stream.space()):
        yield from stream.received(num_bytes)


class Impostor(Protocol):
    """Listens like a host, and answers each call with the next of its answers (after the first, its hello)."""

    address: HostAddress

    def stop(self) -> None: ...


class GrpcImpostor:
    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.address = HostAddress("impostor", "", NODE, 0, f"127.0.0.1:{port}", "")

    def _exchange(self, requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
        yield self._answers[0]
        yield from (answer for answer, _ in zip(self._answers[1:], requests, strict=False))

    def stop(self) -> None:
        self._server.stop(None).wait()


class SocketImpostor:
    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"ray-moe-impostor-{uuid.uuid4().hex}"
        self._listener.bind("\0" + name)
        self._listener.listen()
        self.address = HostAddress("impostor", "", NODE, os.getpid(), "", name)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        line, _ = self._listener.accept()
        with line:
            requests = received(line)
            next(requests)
            line.sendall(self._answers[0])
            with contextlib.suppress(ConnectionError):
                for answer, _ in zip(self._answers[1:], requests, strict=False):
                    line.sendall(answer)

    def stop(self) -> None:
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
