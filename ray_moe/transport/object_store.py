"""Calls to hosts as Ray actor calls, tensors through Ray's object store: for hosts whose port cannot be reached.

Slower than gRPC for small calls (Ray takes a millisecond or two), good for large ones between nodes. Ray itself is the
failure detector: a dead actor is noticed within milliseconds when it is not restarted, in about two seconds when it
is, and an actor that hangs is not noticed at all. The only file of this package that imports ray.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from torch.utils.dlpack import from_dlpack

from ray_moe.errors import ExpertFailed, HostLost, RayMoEError, WireError
from ray_moe.transport import codec
from ray_moe.transport.base import ExpertCall, ExpertReply, Submit
from ray_moe.transport.settings import TransportSettings
from ray_moe.types import HostAddress
from ray_moe.wire import tensors
from ray_moe.wire.tensors import Specs, TensorSpec

ActorHandle = Any
"""A handle of an actor with the method ``async exchange(header, *arrays)``, which calls `serve_exchange`."""


class ObjectStoreTransport:
    """Makes connections to actors. Thread-safe.

    `actor_of` finds the actor of a host; it raises ValueError (as `ray.get_actor` does) when there is none. `on_lost`
    is called once for a connection that turns out to be lost.
    """

    def __init__(
        self,
        actor_of: Callable[[HostAddress], ActorHandle],
        *,
        settings: TransportSettings | None = None,
        on_lost: Callable[[HostAddress], None] | None = None,
    ) -> None:
        self._actor_of = actor_of
        self._settings = settings or TransportSettings()
        self._on_lost = on_lost
        self._open: weakref.WeakSet[ObjectStoreConnection] = weakref.WeakSet()

    def connect(self, address: HostAddress) -> ObjectStoreConnection:
        """A line to the actor at `address`, once it has answered. Raises `HostLost` when it does not in time."""
        try:
            actor = self._actor_of(address)
        except ValueError as error:
            raise HostLost(f"host {address.host_id} has no actor: {error}") from None
        connection = ObjectStoreConnection(address, actor, self._on_lost)
        connection.greet(self._settings.connect_timeout_s)
        self._open.add(connection)
        return connection

    def close(self) -> None:
        """Close every connection. Idempotent."""
        for connection in list(self._open):
            connection.close()


class ObjectStoreConnection:
    """A line to one life of a host's actor. Thread-safe; made by `ObjectStoreTransport.connect`."""

    def __init__(
        self, address: HostAddress, actor: ActorHandle, on_lost: Callable[[HostAddress], None] | None = None
    ) -> None:
        self.address = address
        self._actor = actor
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._in_flight: set[Future[ExpertReply]] = set()
        self._end: str | None = None

    def greet(self, timeout_s: float) -> None:
        """Wait until the actor has answered. Raises `HostLost` when it is not there, or in another life."""
        header = tensors.encode_header((self.address.incarnation, None), ())
        try:
            answer = self._actor.exchange.remote(header).future().result(timeout_s)
            fields, _, _ = tensors.decode(answer[0])
        except FutureTimeoutError:
            raise HostLost(f"the actor of host {self.address.host_id} did not answer within {timeout_s:g} s") from None
        except RayError as error:
            raise HostLost(f"the actor of host {self.address.host_id} is not there: {_first_line(error)}") from None
        if fields != [codec.ROWS_FOLLOW]:
            raise codec.read_failure(fields)

    def submit(self, call: ExpertCall) -> Future[ExpertReply]:
        """Send `call`. Its tensors must not change until this returns; Ray has copied them then."""
        future: Future[ExpertReply] = Future()
        try:
            specs = codec.call_specs(call)
            header = tensors.encode_header((self.address.incarnation, codec.call_fields(call)), specs)
        except WireError as error:
            future.set_exception(error)
            return future
        with self._lock:
            end = self._end
            if end is None:
                self._in_flight.add(future)
        if end is not None:
            future.set_exception(HostLost(end))
            return future
        wanted = codec.wanted(call)
        try:
            answer = self._actor.exchange.remote(header, *_arrays(codec.call_tensors(call))).future()
        except RayError as error:
            self._finish(_first_line(error), by_itself=True)
        else:
            answer.add_done_callback(lambda done: self._answered(future, done, wanted))
        return future

    def close(self) -> None:
        self._finish("it was closed here", by_itself=False)

    def _answered(self, future: Future[ExpertReply], answer: Future[Any], wanted: codec.Wanted) -> None:
        """Runs in a thread of Ray."""
        try:
            reply = _read_reply(answer.result(), wanted)
        except HostLost as error:  # another life answered
            self._finish(str(error), by_itself=True)
        except RayMoEError as error:
            self._fail(future, error)
        except RayError as error:
            if isinstance(error, RayTaskError):  # not the actor is broken, but its method
                self._fail(future, ExpertFailed(f"host {self.address.host_id}: {_first_line(error)}"))
            else:
                self._finish(_first_line(error), by_itself=True)
        except Exception as error:  # Ray would swallow it, and the future never be done
            self._fail(future, ExpertFailed(f"host {self.address.host_id} answered nonsense: {error!r}"))
        else:
            if self._take(future) and future.set_running_or_notify_cancel():
                future.set_result(reply)

    def _fail(self, future: Future[ExpertReply], error: RayMoEError) -> None:
        if self._take(future) and future.set_running_or_notify_cancel():
            future.set_exception(error)

    def _take(self, future: Future[ExpertReply]) -> bool:
        """Whether `future` is still to be completed, by the one who asks."""
        with self._lock:
            if future not in self._in_flight:
                return False
            self._in_flight.remove(future)
            return True

    def _finish(self, reason: str, by_itself: bool) -> None:
        with self._lock:
            if self._end is not None:
                return
            end = self._end = f"the line to host {self.address.host_id} ended: {reason}"
            lost, self._in_flight = self._in_flight, set()
        for future in lost:
            if future.set_running_or_notify_cancel():
                future.set_exception(HostLost(end))
        if by_itself and self._on_lost is not None:
            self._on_lost(self.address)


async def serve_exchange(
    submit: Submit, header: bytes, arrays: Sequence[NDArray[np.uint8]], incarnation: str = ""
) -> tuple[Any, ...]:
    """The host's side, for an actor's ``exchange(header, *arrays)`` to return: a header, then at most one array.

    Never raises: a failure is an answer. `incarnation` is the one of the host's address; a call meant for another life
    is answered with `HostLost`.
    """
    try:
        fields, specs, _ = tensors.decode(header)
        if len(fields) != 2:
            raise WireError("a call names the life of the host and its own fields")
        wanted, call_fields = fields
        if incarnation and wanted and wanted != incarnation:
            raise HostLost("another life of the host answers now")
        if call_fields is None:
            return (tensors.encode_header((codec.ROWS_FOLLOW,), ()),)
        if type(call_fields) is not list:
            raise WireError("the fields of a call are a list")
        reply = await submit(codec.read_call(call_fields, specs, _tensors(arrays, specs)))
        rows = reply.rows
        answer = tensors.encode_header((codec.ROWS_FOLLOW,), (tensors.make_spec(rows.dtype, tuple(rows.shape)),))
        answers = _arrays((rows,))
    except Exception as error:  # whatever it is, the router hears it
        return (tensors.encode_header(codec.failure_fields(error), ()),)
    if answers:
        weakref.finalize(answers[0], reply.release)  # when Ray has copied it
    else:
        reply.release()
    return (answer, *answers)


def _read_reply(answer: Any, wanted: codec.Wanted) -> ExpertReply:
    fields, specs, _ = tensors.decode(answer[0])
    spec, _ = codec.read_reply(fields, specs, wanted)
    (rows,) = _tensors(answer[1:], (spec,))
    if rows is None:
        raise WireError("the host answered without rows")
    return ExpertReply(rows)


def _arrays(contents: codec.Tensors) -> list[NDArray[np.uint8]]:
    """The bytes of each tensor that is there and not empty."""
    return [
        np.frombuffer(tensors.raw(tensor), np.uint8) for tensor in contents if tensor is not None and tensor.numel()
    ]


def _tensors(arrays: Sequence[NDArray[np.uint8]], specs: Specs) -> list[torch.Tensor | None]:
    """What `_arrays` took apart, in the same memory: Ray's arrays are read-only, so the tensors must not be written."""
    rest = list(arrays)
    result: list[torch.Tensor | None] = []
    for spec in specs:
        if spec is None:
            result.append(None)
        elif spec.num_bytes == 0:
            result.append(tensors.tensor_at(b"", 0, spec))
        elif not rest:
            raise WireError("fewer arrays came than the header names")
        else:
            result.append(_tensor(rest.pop(0), spec))
    if rest:
        raise WireError("more arrays came than the header names")
    return result


def _tensor(array: NDArray[np.uint8], spec: TensorSpec) -> torch.Tensor:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != (spec.num_bytes,):
        raise WireError(f"an array of {spec.num_bytes} bytes was announced, and something else came")
    try:
        flat = from_dlpack(array)  # from_numpy would warn: it does not take read-only memory
    except BufferError:  # nor does numpy before 2.1 give it away
        flat = torch.from_numpy(array.copy())
    return flat.view(spec.dtype).view(spec.shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
