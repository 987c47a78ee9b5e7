"""HTTP/1.1 as uvicorn speaks it, but not for ever: a request must have come within a time from its first byte.

uvicorn gives up idle connections only after an answer. Without this, clients that never finish a request, or send
nothing at all, would keep their connections. Used by `server.py`.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class ImpatientProtocol(H11Protocol):
    """Of one connection."""

    def __init__(self, *args: Any, read_timeout_s: float, **kwargs: Any) -> None:
        """Args: read_timeout_s: of a whole request, its body included, and of a new connection before its first."""
        super().__init__(*args, **kwargs)
        self._read_timeout_s = read_timeout_s
        self._due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Whether a part of a request is there and the rest is not."""
        state = self.conn.their_state
        if state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect()
        else:
            self._relax()

    def _expect(self) -> None:
        if self._due is None and not self.transport.is_closing():
            self._due = self.loop.call_later(self._read_timeout_s, self._give_up)

    def _relax(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        has_begun = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if has_begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._tell()
        self.transport.close()

    def _tell(self) -> None:
        said = f"the request did not come within {self._read_timeout_s:g} s (server.read_timeout_s): send it again"
        status = HTTPStatus.REQUEST_TIMEOUT
        headers = [("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(said)))]
        response = h11.Response(
            status_code=status, headers=[*headers, ("connection", "close")], reason=status.phrase.encode()
        )
        for event in (response, h11.Data(data=said.encode()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
