"""One HTTP exchange: reading a body, noticing that the client has gone, and writing an answer or an error."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Send

from ray_moe.errors import Unavailable
from ray_moe.service.admission import Payload
from ray_moe.service.openai.errors import BadRequest, Refusal

R = TypeVar("R")

# Line ends for some clients' readers of event streams, though not by the standard; JSON may spell them otherwise.
_LINE_ENDS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"})


class ClientGone(Exception):
    """The client has closed the connection: nobody is there to be told anything."""


class Reply:
    """What is sent back, once."""

    def __init__(self, send: Send) -> None:
        self._started = False
        self._streaming = False
        self._send = send

    async def json(self, body: str, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = body.encode()
        await self._start(
            status, {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        )
        await self._send({"type": "http.response.body", "body": data})

    async def event(self, data: str) -> None:
        """One server-sent event; the first one begins the stream."""
        if not self._started:
            self._streaming = True
            await self._start(
                200,
                {
                    "content-type": "text/event-stream; charset=utf-8",
                    "cache-control": "no-cache",
                    "x-accel-buffering": "no",  # proxies pass every event on at once
                },
            )
        event = f"data: {data.translate(_LINE_ENDS)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def end(self) -> None:
        """After the last event."""
        self._streaming = False
        await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, refused: Refusal) -> None:
        """An error: the answer, or the last event of a stream that has begun. An answer that was given stands."""
        if self._streaming:
            await self.event(refused.body)
            await self.end()
        elif not self._started:
            await self.json(refused.body, refused.status, refused.headers)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self._started = True
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


async def read_body(request: Request, max_bytes: int, payload: Payload) -> bytes:
    """The body, of at most `max_bytes`, which `payload` then holds.

    Raises: `BadRequest`, `Overloaded`, `ClientGone`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(
            f"the content type is {kind[:200] or 'absent'}; expected application/json",
            code="unsupported_media_type",
            status=415,
        )
    declared = request.headers.get("content-length", "")
    _check_size(int(declared) if declared.isdecimal() else 0, max_bytes)
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        _check_size(len(body) + len(part), max_bytes)
        payload.add(len(part))
        body += part
        more = message.get("more_body", False)
    return bytes(body)


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise BadRequest(
            f"the body has more than {max_bytes:,} bytes: send less at once, or raise the limit of the service",
            code="request_too_large",
            status=413,
        )


async def until_ending(ending: asyncio.Event, work: Coroutine[Any, Any, R], receive: Receive | None = None) -> R:
    """The result of `work`, which is cancelled when `ending` is set and, given `receive`, when the client leaves.

    Nothing of it runs any more when this returns or raises.

    Raises: `Unavailable` when ending, `ClientGone`, and what `work` raises.
    """
    working = asyncio.ensure_future(work)
    ended = asyncio.ensure_future(ending.wait())
    tasks: list[asyncio.Future[Any]] = [working, ended]
    if receive is not None:
        tasks.append(asyncio.ensure_future(_until_gone(receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Unavailable("the service is stopping: retry later or elsewhere") if ended.done() else ClientGone
        if working.cancelled():
            raise RuntimeError("the backend cancelled its own work")
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
