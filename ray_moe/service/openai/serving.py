"""What a POST to the completions and chat completions endpoints goes through, from its bytes to the last piece.

An answer begins with the first piece of a generation, so that what goes wrong before it has the HTTP code of the error
also for streams.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ray_moe.service.admission import Admission
from ray_moe.service.backend import Backend
from ray_moe.service.offload import off_loop
from ray_moe.service.openai.answers import Answer, ChatAnswer, CompletionAnswer
from ray_moe.service.openai.errors import refusal
from ray_moe.service.openai.exchange import ClientGone, Reply, read_body, until_ending
from ray_moe.service.openai.jobs import (
    Job,
    RequestLimits,
    chat_job,
    check_chat,
    check_completion,
    completion_job,
)
from ray_moe.service.openai.merging import merged
from ray_moe.service.openai.schemas import ChatRequest, CompletionRequest, parse
from ray_moe.service.requests import current
from ray_moe.types import GenerateRequest


class Endpoint(ABC):
    """One endpoint of a server."""

    fields: ClassVar[Mapping[str, str]]
    """Our names of fields -> the endpoint's."""
    prompt: ClassVar[str]
    """The field that holds the prompt."""
    answer: ClassVar[type[Answer]]

    def __init__(self, backend: Backend, admission: Admission, limits: RequestLimits) -> None:
        self.backend = backend
        self.limits = limits
        self._admission = admission

    @abstractmethod
    async def job(self, data: bytes) -> Job:
        """The work that the body of a request asks for. Raises any of `ray_moe.errors`."""

    async def serve(self, request: Request, send: Send) -> None:
        """One exchange. Returns when all is said, or when nobody listens any more."""
        asked = current()
        name = secrets.token_hex(12) if asked is None else asked.name
        reply = Reply(send)
        try:
            await self._serve(request, reply, name)
        except ClientGone:
            return
        except Exception as error:
            await reply.refuse(refusal(error, self.fields, self.prompt))

    async def _serve(self, request: Request, reply: Reply, name: str) -> None:
        ending = self._admission.ending
        caller = self._admission.caller(request.headers, "infer")
        self._admission.check()
        with self._admission.payload() as payload:
            data = await until_ending(ending, read_body(request, self.limits.max_request_bytes, payload))
            with self._admission.request(caller):
                job = await until_ending(ending, self.job(data), request.receive)
                del data
                payload.release()
                await until_ending(ending, self._answer(job, reply, name), request.receive)

    async def _answer(self, job: Job, reply: Reply, name: str) -> None:
        answer = self.answer(job, name, self.backend.model_name, self.backend.token_text)
        generations = [self.backend.generate(generation) for generation in job.generations]
        async with aclosing(merged(generations)) as pieces:
            if not job.stream:
                async for index, chunk in pieces:
                    answer.add(index, chunk)
                await reply.json(answer.whole().model_dump_json())
                return
            async for index, chunk in pieces:
                for piece in answer.pieces(index, chunk):
                    await reply.event(piece.model_dump_json())
        if job.include_usage:
            await reply.event(answer.last_piece().model_dump_json())
        await reply.event("[DONE]")
        await reply.end()


class CompletionEndpoint(Endpoint):
    fields: ClassVar[Mapping[str, str]] = CompletionRequest.FIELDS
    prompt = "prompt"
    answer = CompletionAnswer

    async def job(self, data: bytes) -> Job:
        asked, requests = await off_loop(len(data), self._read, data)
        return await completion_job(self.backend, asked, requests)

    def _read(self, data: bytes) -> tuple[CompletionRequest, list[GenerateRequest]]:
        asked = parse(data, CompletionRequest)
        return asked, check_completion(self.backend, self.limits, asked)


class ChatEndpoint(Endpoint):
    fields: ClassVar[Mapping[str, str]] = ChatRequest.FIELDS
    prompt = "messages"
    answer = ChatAnswer

    async def job(self, data: bytes) -> Job:
        asked, messages = await off_loop(len(data), self._read, data)
        return await chat_job(self.backend, self.limits, asked, messages)

    def _read(self, data: bytes) -> tuple[ChatRequest, list[Mapping[str, Any]]]:
        asked = parse(data, ChatRequest)
        return asked, check_chat(self.backend, self.limits, asked)


class Exchange(Response):
    """What the handler of an endpoint returns: the exchange itself, which ends when the client leaves."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint.serve(Request(scope, receive), send)
