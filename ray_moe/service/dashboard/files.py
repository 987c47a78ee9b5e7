"""The files of the dashboard's page, and of the charts' library, which `ray-moe[dashboard]` installs.

Nothing is loaded from anywhere else, and the page may run no script but these (Content-Security-Policy). Called by
`routes.py`.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from starlette.responses import Response

from ray_moe.errors import NotFound

FOLDER = Path(__file__).with_name("static")
CHARTS = "plotly.min.js"

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # plotly also wants a style for its maps, which is refused and not missed.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",  # asked for again, and answered by 304 while it is the same
    "vary": "accept-encoding",
}


@dataclass(frozen=True, slots=True)
class _File:
    plain: bytes
    packed: bytes
    kind: str
    etag: str


class Files:
    """They are read when they are first asked for, and kept."""

    def __init__(self) -> None:
        self._paths = {path.name: path for path in FOLDER.iterdir() if path.suffix in _KINDS}
        charts = _charts()
        if charts is not None:
            self._paths[CHARTS] = charts
        self._read: dict[str, _File] = {}

    async def answer(self, name: str, headers: Mapping[str, str]) -> Response:
        """One of them. Raises: `NotFound`."""
        if name == CHARTS and name not in self._paths:
            raise NotFound("the charts need plotly: pip install 'ray-moe[dashboard]' where the routers run")
        if name not in self._paths:
            raise NotFound("the dashboard has no such file")
        file = self._read.get(name)
        if file is None:
            file = self._read[name] = await asyncio.to_thread(_read, self._paths[name])
        told = {**_HEADERS, "etag": file.etag, "content-type": file.kind}
        if headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=told)
        if "gzip" in headers.get("accept-encoding", ""):
            return Response(file.packed, headers={**told, "content-encoding": "gzip"})
        return Response(file.plain, headers=told)


def compressed(data: bytes, level: int = 6) -> bytes:
    return gzip.compress(data, level, mtime=0)


def _read(path: Path) -> _File:
    plain = path.read_bytes()
    etag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return _File(plain, compressed(plain), _KINDS[path.suffix], etag)


def _charts() -> Path | None:
    """plotly's script, without importing plotly, which takes a while; None where it is not installed."""
    found = find_spec("plotly")
    for folder in [] if found is None else found.submodule_search_locations or []:
        path = Path(folder, "package_data", CHARTS)
        if path.is_file():
            return path
    return None
