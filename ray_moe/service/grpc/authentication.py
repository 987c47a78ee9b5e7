"""Who makes a gRPC call: the API key in its metadata, to a `Caller`. Used by the guard."""

from __future__ import annotations

from typing import Any

import grpc

from ray_moe.service.auth import Caller, KeyRing, presented_key
from ray_moe.service.keys import Role


def authenticate(keys: KeyRing, context: grpc.aio.ServicerContext[Any, Any], role: Role | None) -> Caller:
    """The caller, from `authorization: Bearer KEY` or `x-api-key: KEY`.

    It is cheap enough for each message of a long stream, which then ends soon after its key is revoked.

    Args:
        keys: of the service.
        context: of the call.
        role: that the call needs; None: any valid key will do.

    Raises:
        Unauthenticated: there is no valid key.
        PermissionDenied: the key lacks `role`.
    """
    headers: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        headers.setdefault(name.lower(), value if isinstance(value, str) else value.decode("latin-1"))
    caller = keys.identify(presented_key(headers.get("authorization"), headers.get("x-api-key")))
    if role is not None:
        caller.require(role)
    return caller
