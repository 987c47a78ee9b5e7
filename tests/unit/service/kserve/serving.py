"""A `grpc.aio` server with nothing but the Open Inference Protocol, over the backend without a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import numpy as np
from grpc_reflection.v1alpha import reflection

from ray_moe.service.admission import Admission
from ray_moe.service.grpc.guard import Guard
from ray_moe.service.kserve.reflection import pool_of
from ray_moe.service.kserve.servicer import KServeService
from ray_moe.wire.kserve import grpc_service_pb2 as pb
from ray_moe.wire.v1 import inference_pb2
from tests.unit.service.fake_backend import LAYER, FakeBackend

LAYER_MODEL = f"tiny/{LAYER}"


@asynccontextmanager
async def serving(
    backend: FakeBackend, *, max_concurrent_requests: int = 8, max_in_flight_bytes: int = 2**30
) -> AsyncIterator[tuple[str, Guard]]:
    """The target of a server on the loopback, and its guard."""
    guard = Guard(Admission(backend, max_concurrent_requests, max_in_flight_bytes))
    service = KServeService(backend, guard, max_forward_tokens=100, max_prompt_bytes=1000)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers([service.handler()])
    pool = pool_of(pb.DESCRIPTOR, inference_pb2.DESCRIPTOR)
    reflection.enable_server_reflection([service.NAME, reflection.SERVICE_NAME], server, pool)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", guard
    finally:
        await server.stop(0)


@contextmanager
def serving_in_thread(backend: FakeBackend) -> Iterator[str]:
    """The target of a server for a client that blocks: it has a loop and a thread of its own.

    Not for use beside a loop with `grpc.aio` objects: grpc wakes one of two loops in vain, which then logs an error.
    """
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()
    ready = threading.Event()
    target: list[str] = []

    async def run() -> None:
        async with serving(backend) as (address, _):
            target.append(address)
            ready.set()
            await ending.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        if not ready.wait(10):
            raise TimeoutError("the server did not start")
        yield target[0]
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()


def typed(name: str, datatype: str, field: str, values: Any, shape: Sequence[int] | None = None) -> Any:
    """An input with typed contents."""
    array = np.asarray(values)
    contents = pb.InferTensorContents(**{field: array.ravel().tolist()})
    sizes = array.shape if shape is None else shape
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=sizes, contents=contents)


def text(name: str, *values: bytes) -> Any:
    return typed(name, "BYTES", "bytes_contents", np.array(values, object))


def raw(name: str, datatype: str, shape: Sequence[int]) -> Any:
    """An input whose contents are to be raw."""
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)


def parameter(value: Any) -> pb.InferParameter:
    field = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
    return pb.InferParameter(**{field: value})


def ask(*inputs: Any, model: str = "tiny", outputs: Sequence[str] = (), **parameters: Any) -> pb.ModelInferRequest:
    """A request with typed inputs."""
    return pb.ModelInferRequest(
        model_name=model,
        inputs=inputs,
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        parameters={name: parameter(value) for name, value in parameters.items()},
    )
