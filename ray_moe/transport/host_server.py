"""What a host listens with: a Unix socket for routers on its own node, gRPC for all others."""

from __future__ import annotations

import asyncio

from ray_moe.transport.base import Submit
from ray_moe.transport.grpc_server import GrpcServer
from ray_moe.transport.hello import Doorkeeper
from ray_moe.transport.settings import MemberCertificate, TransportSettings
from ray_moe.transport.socket_server import SocketServer


class HostServer:
    """Receives the calls of every router, in the event loop that starts it.

    `incarnation` is the one of the host's `HostAddress`: a router that looks for another life is turned away. With a
    `certificate`, what comes over TCP must be encrypted and show one of the same authority; the Unix socket is for this
    machine, which nothing leaves, and stays in clear. The token is asked for at both. The tensors of a call may lie in
    memory that the router reuses once it has the answer: they are valid until `submit` returns, and must not be kept or
    written to.
    """

    def __init__(
        self,
        submit: Submit,
        token: str,
        *,
        incarnation: str = "",
        settings: TransportSettings | None = None,
        certificate: MemberCertificate | None = None,
    ) -> None:
        doorkeeper = Doorkeeper(token, incarnation)
        settings = settings or TransportSettings()
        self._grpc = GrpcServer(submit, doorkeeper, settings, certificate)
        self._socket = SocketServer(submit, doorkeeper, settings)

    async def start(self, host_ip: str = "127.0.0.1", port: int = 0) -> tuple[str, str]:
        """Listen on `host_ip` (port 0 takes a free one) and on an abstract Unix socket.

        Returns what belongs into `HostAddress.tcp` and `.unix`. Raises `InsufficientResources` when the port is taken.
        """
        tcp = await self._grpc.start(host_ip, port)
        return tcp, await self._socket.start()

    async def stop(self) -> None:
        """End every line (calls in flight are cancelled) and stop listening. Idempotent."""
        await asyncio.gather(self._grpc.stop(), self._socket.stop())
