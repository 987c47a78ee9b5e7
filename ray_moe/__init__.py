"""Every expert its own actor: Mixture-of-Experts models served on Ray, one expert at a time.

The root is lazy: importing it costs nothing, and the client can be used without Ray and torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_moe.client.aio import AsyncClient
    from ray_moe.client.sync import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]

_LAZY = {"Client": "ray_moe.client.sync", "AsyncClient": "ray_moe.client.aio"}


def __getattr__(name: str) -> Any:
    """Import the client when it is first named (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
