"""Which pages a browser may speak for, where the service asks for no key.

A service on the loopback trusts whoever is on the machine, and so is every page that somebody opens there in a browser,
unless two headers are looked at that no page can choose. With keys none of this is needed: a page of somebody else's
has no key, since it is sent in a header and never in a cookie. Called by `routes.py`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from ray_moe.errors import PermissionDenied


def check(headers: Mapping[str, str], *, changes: bool) -> None:
    """Whether the dashboard's own page may be asking, or no browser at all.

    Args:
        headers: by their names in lower case.
        changes: the request changes something, so that being answered is all another page would need.

    Raises: `PermissionDenied`.
    """
    host = headers.get("host", "")
    # A page at a name that its owner lets point to this machine (DNS rebinding) is of the same origin to the browser;
    # it cannot do so to an address.
    if not _is_address(host):
        raise PermissionDenied(
            f"without keys the dashboard is reached by localhost or an address, and not as {host[:200]!r}: "
            "use one of these, or have keys asked for (server.keys_file)"
        )
    if not changes:
        return
    origin = headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
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
