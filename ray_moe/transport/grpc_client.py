"""One long-lived bidirectional gRPC stream to a host, for a `StreamConnection`.

The synchronous API of grpc is used on purpose: it needs no event loop, so calls may come from any thread. With a
certificate, the stream is encrypted and each end checks the other's; the token is asked for on every stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from ray_moe.errors import Unauthenticated, WireError
from ray_moe.transport import frames
from ray_moe.transport.connection import LineEnded, Received
from ray_moe.transport.grpc_options import (
    ARENA_KEY,
    DEVICE_ARENA_KEY,
    INCARNATION_KEY,
    METHOD,
    SERVICE,
    TOKEN_KEY,
    TOKEN_PREFIX,
    VERSION_KEY,
    channel_credentials,
    client_options,
    grpc,
)
from ray_moe.transport.hello import Hello
from ray_moe.transport.outbox import Outbox
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.wire.tensors import Buffer

_DISTRUST = re.compile("handshake failed|verification check failed|socket closed", re.IGNORECASE)
"""What grpc says when the ends do not agree about encryption or certificates. One that is refused hears no reason."""


class GrpcCarrier:
    """The stream to `target`, encrypted if there is a certificate."""

    def __init__(self, target: str, settings: TransportSettings, certificate: MemberCertificate | None) -> None:
        self.target = target
        self.is_encrypted = certificate is not None
        self.is_distrusted = False
        self._has_heard = False
        self._settings = settings
        self._outbox = Outbox()
        options = client_options(settings)
        if certificate is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            options.append(("grpc.ssl_target_name_override", certificate.name))
            self._channel = grpc.secure_channel(target, channel_credentials(certificate), options)

    def open(self, hello: Hello, received: Received) -> None:
        self._received = received
        metadata: tuple[tuple[str, str | bytes], ...] = (
            (TOKEN_KEY, TOKEN_PREFIX + hello.token),
            (VERSION_KEY, str(hello.version)),
            (INCARNATION_KEY, hello.incarnation),
        )
        for key, offer in ((ARENA_KEY, hello.arena), (DEVICE_ARENA_KEY, hello.device_arena)):
            if offer is not None:
                metadata += ((key, offer),)
        exchange = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)  # no serializer: bytes
        # What grpc sends, when it asks, until there is no more.
        self._stream = exchange(iter(partial(self._outbox.take, True), None), metadata=metadata)

    def send(self, message_id: int, buffers: Sequence[Buffer], num_bytes: int) -> None:
        if num_bytes <= self._settings.chunk_bytes:
            self._outbox.put(frames.frame(message_id, buffers, num_bytes))
        else:
            self._outbox.put(frames.cut(message_id, buffers, num_bytes, self._settings.chunk_bytes))

    def listen(self) -> None:
        assembler = frames.Assembler(self._settings.max_message_bytes)
        try:
            for frame in self._stream:
                message = assembler.feed(frame)
                if message is not None:
                    self._has_heard = True
                    self._received(*message)
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def fileno(self) -> int:
        return -1

    def set_listening(self, is_on: bool) -> None:
        """It always does."""

    def take_in(self) -> bool:
        return True

    def close(self) -> None:
        self._outbox.close()
        self._stream.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs forgot
        self._channel.close()

    def _explain(self, error: grpc.RpcError) -> LineEnded:
        """Why the stream ended, and what the host said on purpose instead of hello."""
        code, details = error.code(), error.details() or ""
        if not self._has_heard and _DISTRUST.search(details):
            self.is_distrusted = True
            details = f"{details}; {self._advice}"
        refusals = {grpc.StatusCode.UNAUTHENTICATED: Unauthenticated, grpc.StatusCode.UNIMPLEMENTED: WireError}
        refusal = refusals.get(code)
        return LineEnded(f"{code.name}: {details}", None if refusal is None else refusal(details))

    @property
    def _advice(self) -> str:
        if self.is_encrypted:
            return "no encrypted line: both ends need transport.tls, and certificates of one authority and one name"
        return "perhaps the host expects an encrypted line (transport.tls), and this router has no certificate"
