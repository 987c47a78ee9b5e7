"""Which pages a browser may speak for, where the service asks for no key.

A service on the loopback trusts whoever is on the machine, and so is every page that somebody opens there in a browser,
unless headers are looked at that no page can choose: by `OwnHost` for all that is served, and by the dashboard for what
changes the service. With keys none of this is needed: a page of somebody else's has no key, since it is sent in a
header and never in a cookie. Used by `app.py` and `dashboard/routes.py`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ray_moe.errors import PermissionDenied
from ray_moe.service.refusals import Refusals


class OwnHost:
    """Around the application: whoever calls it by a name that others can rebind is refused, see `check_host`."""

    def __init__(self, app: ASGIApp, refusals: Refusals) -> None:
        self._app = app
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            with self._refusals.counted("host"):
                check_host(Headers(scope=scope))
        await self._app(scope, receive, send)


def check_host(headers: Mapping[str, str]) -> None:
    """Whether the service was called by localhost or an address.

    A page at a name that its owner lets point to this machine (DNS rebinding) is of the same origin to the browser,
    which so lets it read the answers; it cannot do so to an address.

    Args:
        headers: by their names in lower case.

    Raises: `PermissionDenied`.
    """
    host = headers.get("host", "")
    if not _is_address(host):
        raise PermissionDenied(
            f"without keys the service is reached by localhost or an address, and not as {host[:200]!r}: "
            "use one of these, or have keys asked for (server.keys_file)"
        )


def check_page(headers: Mapping[str, str]) -> None:
    """Whether the service's own page may be asking, or no browser at all, where being answered is all that another page
    would need: where something is changed.

    Args:
        headers: by their names in lower case.

    Raises: `PermissionDenied`.
    """
    origin = headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower():
        raise PermissionDenied(f"a page of {origin[:200]!r} may not change this service: use the service's own")
    site = headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin":
        raise PermissionDenied(f"a {site[:200]} page may not change this service: use the service's own")


def _is_address(host: str) -> bool:
    """Whether a `Host` header is localhost or an IP address, with or without a port."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
