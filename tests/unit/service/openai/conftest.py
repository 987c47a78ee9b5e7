from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from tests.unit.service.openai.http_door import TellingBackend, async_client, http_door, without_server


@pytest.fixture
def backend() -> TellingBackend:
    return TellingBackend()


@pytest.fixture
async def address(backend: TellingBackend) -> AsyncIterator[str]:
    async with http_door(backend) as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with async_client(address) as client:
        yield client


@pytest.fixture
async def http(address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address) as http:
        yield http


@pytest.fixture
async def direct(backend: TellingBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with without_server(backend) as direct:
        yield direct
