"""Who calls, and what they may do: API keys, roles and limits, for every front door.

A front door reads the key that came with a request (`presented_key`), asks the `KeyRing` who that is, and asks the
`Caller` for the role that the call needs and for leave to begin. Knows neither gRPC nor HTTP.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_moe.errors import PermissionDenied, Unauthenticated
from ray_moe.service.keys import ROLES, ApiKey, Role, digest_of, read_keys
from ray_moe.service.limits import UNLIMITED, Limits, Meter
from ray_moe.service.reloading import Reloading

ANONYMOUS = "anonymous"

NoCaller = Literal["no_key", "unknown_key", "expired_key"]
"""Why a request is nobody's."""
_TOLD: dict[NoCaller, str] = {
    "no_key": "this service needs an API key: send one as `authorization: Bearer KEY`",
    "unknown_key": "this API key is not known here: check it, or ask whoever runs the service for one",
    "expired_key": "this API key has expired: ask whoever runs the service for another",
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is."""

    name: str
    roles: frozenset[Role]
    limits: Limits
    meter: Meter
    """Shared by all keys of that name."""

    def require(self, role: Role | None) -> None:
        """Raises: `PermissionDenied` unless the caller has `role`; None is any but metrics, which reads those alone."""
        if not ({role} if role is not None else set(ROLES) - {"metrics"}) & self.roles:
            needs = f"the role {role}" if role is not None else "a role besides metrics"
            has = ", ".join(sorted(self.roles))
            raise PermissionDenied(f"this call needs {needs}, and this API key has {has}: use one that has it")

    def request(self) -> AbstractContextManager[None]:
        """Around a request of the caller's, while it is answered.

        Raises: `Overloaded` when one of the caller's limits is reached.
        """
        return self.meter.request(self.limits)

    def spend(self, num_tokens: int, *, begun: bool = False) -> None:
        """Count tokens, see `Meter.spend`.

        Raises: `Overloaded` when none are left and the request is not `begun`.
        """
        self.meter.spend(self.limits, num_tokens, begun=begun)


class KeyRing:
    """The keys of one service, as its file says now: a change counts within about a second. Thread-safe.

    Without a file every request is `ANONYMOUS` and may do everything.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: the file, see `service/keys.py`; None lets everybody in.
            clock: seconds from any origin; never goes back.
            unix_time: what `expires_at` is compared with.
        """
        self._clock = clock
        self._unix_time = unix_time
        self._meters: dict[str, Meter] = {}
        self._anonymous = Caller(ANONYMOUS, frozenset(ROLES), UNLIMITED, Meter(clock))
        self._keys = None if path is None else Reloading([path], lambda: _by_digest(read_keys(path)), clock=clock)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._keys is not None

    def load(self) -> None:
        """Read the file, at the start of a service.

        Raises:
            InvalidConfig: it cannot be read, or is wrong.
        """
        if self._keys is not None:
            self._keys.load()

    def identify(self, presented: str | None, refused: Callable[[NoCaller], None] | None = None) -> Caller:
        """Whose key that is. Looks at the file if it has not for a second.

        Takes the same time for any wrong key: what is looked up is a digest, which nobody can steer towards another
        without breaking SHA-256, so that how far two agree tells nothing about a key; and the final comparison does not
        depend on where they differ.

        Args:
            presented: the key that came with the request.
            refused: told why, before it is raised.

        Raises:
            Unauthenticated: there is no key, it is unknown, or it has expired.
            InvalidConfig: the file could not be read even once.
        """
        if self._keys is None:
            return self._anonymous
        key = self._look_up(self._keys.current(), presented)
        if not isinstance(key, ApiKey):
            if refused is not None:
                refused(key)
            raise Unauthenticated(_TOLD[key])
        meter = self._meters.get(key.name) or self._meters.setdefault(key.name, Meter(self._clock))
        return Caller(key.name, key.roles, key.limits, meter)

    def _look_up(self, keys: Mapping[bytes, ApiKey], presented: str | None) -> ApiKey | NoCaller:
        if not presented:
            return "no_key"
        digest = digest_of(presented)
        key = keys.get(digest)
        if key is None or not hmac.compare_digest(key.digest, digest):
            return "unknown_key"
        expired = key.expires_at is not None and self._unix_time() >= key.expires_at
        return "expired_key" if expired else key


def presented_key(authorization: str | None, x_api_key: str | None) -> str | None:
    """The API key of a request from two of its headers; the first one counts if it is `Bearer KEY`.

    Returns: None when there is none.
    """
    scheme, _, key = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return (x_api_key or "").strip() or None


def _by_digest(keys: tuple[ApiKey, ...]) -> dict[bytes, ApiKey]:
    return {key.digest: key for key in keys}
