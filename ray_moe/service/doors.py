"""The front doors that a router opens; the composition root hands them down by name.

Every actor of a service gets that name with its specification and so imports this module, also those that only
coordinate: it must not import torch or transformers, which take seconds.
"""

from __future__ import annotations

from ray_moe.actors.spec import FrontDoor
from ray_moe.config import ServerConfig
from ray_moe.service.backend import Backend
from ray_moe.service.grpc.server import FrontDoor as GrpcFrontDoor


def open_grpc(backend: Backend, server: ServerConfig) -> FrontDoor:
    """The gRPC front door of a router."""
    return GrpcFrontDoor(
        backend,
        server.host,
        server.port,
        max_request_bytes=server.max_request_bytes,
        max_forward_tokens=server.max_forward_tokens,
        max_prompt_bytes=server.max_prompt_bytes,
        max_in_flight_bytes=server.max_in_flight_bytes,
    )
