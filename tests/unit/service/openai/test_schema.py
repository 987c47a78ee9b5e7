"""The service does what its OpenAPI document says: schemathesis sends what it allows, and what it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from ray_moe.service.admission import Admission
from ray_moe.service.openai.app import make_app
from ray_moe.service.openai.server import HttpFrontDoor
from ray_moe.types import GenerateChunk, GenerateRequest
from tests.unit.service.openai.http_door import MODEL, TellingBackend


class WideBackend(TellingBackend):
    """Takes whatever the document allows, since what depends on the model is not in it, and has little to say."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 2**31
        self.max_positions = None

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return (1, 2)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        return super().generate(replace(request, max_new_tokens=min(2, request.max_new_tokens)))


def described() -> dict[str, Any]:
    """The document, but with the names of models that make sense."""
    document = make_app(WideBackend(), Admission(WideBackend(), 1, 1)).openapi()
    for name in ("CompletionRequest", "ChatRequest"):
        properties = document["components"]["schemas"][name]["properties"]
        properties["model"] = {"const": MODEL}
    (name_parameter,) = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    name_parameter["schema"] = {"enum": [MODEL, "no such/model"]}
    return document


CONFIG = SchemathesisConfig.from_dict({})
schema = schemathesis.openapi.from_dict(described(), config=CONFIG)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def opened() -> tuple[HttpFrontDoor, int]:
        door = HttpFrontDoor(WideBackend(), port=0)
        return door, await door.start()

    door, port = asyncio.run_coroutine_threadsafe(opened(), loop).result()
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(door.stop(0), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@schema.parametrize()
@settings(max_examples=20, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_the_service_does_what_its_document_says(case: Any, address: str) -> None:
    case.call_and_validate(base_url=address)
