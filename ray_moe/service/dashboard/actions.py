"""What the dashboard can have done: a plan, a drain, a fault on purpose; each a small JSON object in and out.

Whatever changes something wants ``"confirm": true`` beside it. The checks and the work are those of gRPC's `Admin`.
Called by `routes.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray_moe.errors import InvalidRequest
from ray_moe.service import validation
from ray_moe.service.backend import Backend
from ray_moe.types import ChaosRequest

MAX_TOLD_MOVES = 100
"""Of a plan; how many there are is told as well."""

_CHAOS = ChaosRequest("")
_NAMES = {bool: "true or false", str: "a text", float: "a number", int: "a whole number"}


class Actions:
    """Over a backend; whoever calls has been let in."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def plan(self, body: bytes) -> dict[str, Any]:
        """A better placement; carried out unless ``dry_run``. Raises: `InvalidRequest`, and what the backend does."""
        wish = _read(body, {"dry_run": False, "confirm": False})
        if not wish["dry_run"]:
            _confirmed(wish)
        told = asdict(await self._backend.plan(wish["dry_run"]))
        return told | {"num_moves": len(told["moves"]), "moves": told["moves"][:MAX_TOLD_MOVES]}

    async def drain(self, body: bytes) -> dict[str, Any]:
        """Begin to empty a host, or those of a node; which these are. Raises as `plan`."""
        wish = _read(body, {"target": "", "replace": False, "confirm": False})
        if not wish["target"]:
            raise InvalidRequest("expected the name of an expert actor, or the id of a node, as the target")
        _confirmed(wish)
        return {"host_ids": list(await self._backend.drain(wish["target"], wish["replace"]))}

    async def chaos(self, body: bytes) -> dict[str, Any]:
        """A fault on purpose, and what came of it. Raises as `plan`."""
        fields = ("kind", "target", "duration_s", "factor", "seed")
        wish = _read(body, {name: getattr(_CHAOS, name) for name in fields} | {"confirm": False})
        request = validation.chaos(ChaosRequest(**{name: wish[name] for name in fields}))
        _confirmed(wish)
        return asdict(await self._backend.chaos(request))


def _read(body: bytes, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object, each of its default's type; those that are not there have their defaults.

    Raises: `InvalidRequest`, also for what is not known: a misspelt wish is not to be half done.
    """
    try:
        given = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the body is no JSON; expected an object") from error
    if not isinstance(given, dict):
        raise InvalidRequest("the body is no JSON object")
    for name, value in given.items():
        if name not in defaults:
            raise InvalidRequest(f"{name[:100]!r} is not known here; expected some of {', '.join(defaults)}")
        kind = type(defaults[name])
        if not (type(value) is kind or (kind is float and type(value) is int and abs(value) < 2**53)):
            raise InvalidRequest(f"{name} is {json.dumps(value)[:100]}; expected {_NAMES[kind]}")
    return {name: type(default)(given.get(name, default)) for name, default in defaults.items()}


def _confirmed(wish: Mapping[str, Any]) -> None:
    if not wish["confirm"]:
        raise InvalidRequest("this changes the service: say so with confirm, which is true then")
