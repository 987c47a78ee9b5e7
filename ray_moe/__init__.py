"""Every expert its own actor: Mixture-of-Experts models served and trained on Ray, one expert at a time.

The root is lazy: importing it costs nothing, and the client can be used without Ray and torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_moe.client.aio import AsyncClient
    from ray_moe.client.sync import Client
    from ray_moe.config import Config
    from ray_moe.models.inspect import inspect
    from ray_moe.models.merge import MergeSettings, merge
    from ray_moe.models.upcycle import UpcycleSettings, upcycle
    from ray_moe.ops.layer import MoELayer
    from ray_moe.ops.methods.driver import Methods
    from ray_moe.service.composition import Service
    from ray_moe.service.network import remote_trainer
    from ray_moe.service.training import train
    from ray_moe.training.loading import load_trained

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Client",
    "Config",
    "MergeSettings",
    "Methods",
    "MoELayer",
    "Service",
    "UpcycleSettings",
    "__version__",
    "inspect",
    "load_trained",
    "merge",
    "remote_trainer",
    "train",
    "upcycle",
]

_LAZY = {
    "AsyncClient": "ray_moe.client.aio",
    "Client": "ray_moe.client.sync",
    "Config": "ray_moe.config",
    "Service": "ray_moe.service.composition",
    "inspect": "ray_moe.models.inspect",
    "MergeSettings": "ray_moe.models.merge",
    "merge": "ray_moe.models.merge",
    "UpcycleSettings": "ray_moe.models.upcycle",
    "upcycle": "ray_moe.models.upcycle",
    "MoELayer": "ray_moe.ops.layer",
    "Methods": "ray_moe.ops.methods.driver",
    "remote_trainer": "ray_moe.service.network",
    "train": "ray_moe.service.training",
    "load_trained": "ray_moe.training.loading",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first named (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
