"""The requests of a stream of batches, kept until they are answered: another stream goes on where one broke off.

A layer's answer depends on nothing but its request, so what is not answered may be asked again. What is kept is what
gRPC has taken from the caller's iterable and the service has not answered yet.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

from ray_moe.client.requests import Forward, ForwardCodec
from ray_moe.wire.v1 import inference_pb2 as pb


class _Outbox:
    def __init__(self) -> None:
        self.codec = ForwardCodec()
        self._kept: dict[int, pb.ForwardRequest] = {}
        """By number, from 0 in the order of the requests."""
        self._num_read = 0
        self._num_answered = 0
        self._is_exhausted = False
        self._failure: Exception | None = None

    def answered(self) -> None:
        """The next request has its answer."""
        self._kept.pop(self._num_answered, None)
        self._num_answered += 1

    def check(self) -> None:
        """After the stream: raises what the caller's iterable raised, or what could not be encoded."""
        if self._failure is not None:
            raise self._failure

    def _keep(self, request: Forward) -> None:
        self._kept[self._num_read] = self.codec.encode(request)
        self._num_read += 1

    def _fail(self, error: Exception) -> None:
        self._is_exhausted, self._failure = True, error


class Outbox(_Outbox):
    """For the synchronous client. gRPC reads each stream's requests in a thread of its own."""

    def __init__(self, requests: Iterable[Forward]) -> None:
        super().__init__()
        self._source = iter(requests)
        self._reading = threading.Lock()

    def messages(self) -> Iterator[pb.ForwardRequest]:
        """For one stream: all that are not answered, then the rest."""
        number = self._num_answered
        while (message := self._kept.get(number) or self._read(number)) is not None:
            yield message
            number += 1

    def _read(self, number: int) -> pb.ForwardRequest | None:
        """The thread of a broken stream may still wait for the next request: what it gets is kept for its successor."""
        with self._reading:
            if number == self._num_read and not self._is_exhausted:
                try:
                    self._keep(next(self._source))
                except StopIteration:
                    self._is_exhausted = True
                except Exception as error:  # raised by `check`, in the caller's thread
                    self._fail(error)
            return self._kept.get(number)


class AsyncOutbox(_Outbox):
    """For the asyncio client. gRPC cancels the reading of requests when a stream breaks."""

    def __init__(self, requests: Iterable[Forward] | AsyncIterable[Forward]) -> None:
        super().__init__()
        self._source = aiter(requests if isinstance(requests, AsyncIterable) else _one_by_one(requests))
        self._reading: asyncio.Task[None] | None = None

    async def messages(self) -> AsyncIterator[pb.ForwardRequest]:
        """For one stream: all that are not answered, then the rest."""
        number = self._num_answered
        while (message := self._kept.get(number) or await self._read(number)) is not None:
            yield message
            number += 1

    async def _read(self, number: int) -> pb.ForwardRequest | None:
        """What a broken stream was waiting for is waited for on by its successor."""
        while number == self._num_read and not self._is_exhausted:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.ensure_future(self._read_next())
            await asyncio.shield(self._reading)
        return self._kept.get(number)

    async def _read_next(self) -> None:
        try:
            self._keep(await anext(self._source))
        except StopAsyncIteration:
            self._is_exhausted = True
        except Exception as error:  # raised by `check`, to the caller
            self._fail(error)

    def close(self) -> None:
        """Wait for no further request."""
        if self._reading is not None:
            self._reading.cancel()


async def _one_by_one(requests: Iterable[Forward]) -> AsyncIterator[Forward]:
    for request in requests:
        yield request
