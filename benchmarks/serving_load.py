"""Clients of an OpenAI-compatible server: so many at a time, each with one streamed completion after the other.

While they run they only note when which bytes came; what those say is read afterwards, so that the clients, which share
the cores with the servers, take as little of them as they can. Used by `benchmarks/serving.py`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request: a prompt of `num_prompt` tokens, to be continued greedily by exactly `num_output`."""

    prompt: str
    num_prompt: int
    num_output: int


@dataclass(slots=True)
class Answer:
    """What came of a job, and when, in seconds of `time.perf_counter`."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    """When each token's text was there."""
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of a fixed amount of work, in the order of the jobs."""

    answers: list[Answer]
    wall_s: float
    client_cpu_s: float
    """Spent by the clients themselves."""

    def figures(self) -> dict[str, float]:
        """Rates in tokens/s; latencies in seconds: to the first token, and between two tokens of a stream."""
        first = [answer.token_s[0] - answer.sent_s for answer in self.answers]
        between = np.concatenate([np.diff(answer.token_s) for answer in self.answers])
        num_output = sum(len(answer.token_s) for answer in self.answers)
        num_prompt = sum(answer.usage["prompt_tokens"] for answer in self.answers)
        return {
            "output_tokens_per_s": num_output / self.wall_s,
            "total_tokens_per_s": (num_prompt + num_output) / self.wall_s,
            "ttft_p50_s": float(np.percentile(first, 50)),
            "ttft_p99_s": float(np.percentile(first, 99)),
            "itl_p50_s": float(np.percentile(between, 50)),
            "itl_p99_s": float(np.percentile(between, 99)),
        }


def run(url: str, model: str, jobs: Sequence[Job], num_clients: int) -> Load:
    """Have all jobs done; raises RuntimeError for an answer that is not as long as it was asked to be."""
    return asyncio.run(_run(url, model, jobs, num_clients))


async def _run(url: str, model: str, jobs: Sequence[Job], num_clients: int) -> Load:
    waiting = iter(range(len(jobs)))
    received: dict[int, tuple[float, list[tuple[float, bytes]]]] = {}
    limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:

        async def work() -> None:
            for number in waiting:  # each takes the next one that nobody has
                received[number] = await _ask(client, url, model, jobs[number])

        cpu_s, began_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(num_clients)))
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return Load([_read(job, *received[number]) for number, job in enumerate(jobs)], wall_s, cpu_s)


async def _ask(client: httpx.AsyncClient, url: str, model: str, job: Job) -> tuple[float, list[tuple[float, bytes]]]:
    """When it was sent, and what came when."""
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.num_output,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent_s = time.perf_counter()
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        came = [(time.perf_counter(), data) async for data in response.aiter_raw()]
    if response.status_code != 200:
        raise RuntimeError(f"{url} answered {response.status_code}: {b''.join(data for _, data in came)[:500]!r}")
    return sent_s, came


def _read(job: Job, sent_s: float, came: Sequence[tuple[float, bytes]]) -> Answer:
    answer = Answer(sent_s)
    for at_s, event in _events(came):
        if "error" in event:
            raise RuntimeError(f"the server failed in the middle of an answer: {event['error']}")
        text = "".join(choice["text"] for choice in event.get("choices", []))
        if text:
            answer.token_s.append(at_s)
            answer.text += text
        answer.usage = event.get("usage") or answer.usage
    told = (answer.usage.get("prompt_tokens"), answer.usage.get("completion_tokens"), len(answer.token_s))
    if told != (job.num_prompt, job.num_output, job.num_output):
        raise RuntimeError(
            f"an answer has {told[0]} tokens of prompt, {told[1]} generated and {told[2]} pieces of text; "
            f"expected {job.num_prompt}, {job.num_output} and one piece for each token"
        )
    return answer


def _events(came: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The server-sent events, each with the time at which its last byte came."""
    rest = b""
    for at_s, data in came:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and content != b"[DONE]":
                yield at_s, json.loads(content)
