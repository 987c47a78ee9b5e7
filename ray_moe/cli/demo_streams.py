"""Streams of the demo: several generations at once, timed, with something happening in the middle of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil

from ray_moe.client.sync import Client
from ray_moe.errors import RayMoEError, Unavailable
from ray_moe.types import HostStatus

WARM_TOKENS = 8
"""A stream is under way when it has given this many tokens."""


@dataclass(slots=True)
class Stream:
    """One generation as it arrived."""

    prompt: str
    token_ids: list[int] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    """When each piece came, on the monotonic clock."""
    finish_reason: str = ""
    error: str = ""
    under_way: threading.Event = field(default_factory=threading.Event)
    """Set when the stream has given `WARM_TOKENS`, or has ended."""

    @property
    def longest_stall_s(self) -> float:
        """Longest time between two pieces."""
        pauses = [later - earlier for earlier, later in zip(self.arrived_s, self.arrived_s[1:], strict=False)]
        return max(pauses, default=0.0)


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """Of all streams together, from the first piece of any to the last of any."""
    arrived_s = [moment for stream in streams for moment in stream.arrived_s]
    num_tokens = sum(len(stream.token_ids) for stream in streams)
    return num_tokens / (max(arrived_s) - min(arrived_s)) if len(arrived_s) > 1 else 0.0


def run_streams(
    client: Client, prompts: Sequence[str], max_new_tokens: int, meanwhile: Callable[[], None] = lambda: None
) -> list[Stream]:
    """Continue all prompts at once, greedily; call `meanwhile` when every stream is under way.

    A stream that fails says so in its `error`; what `meanwhile` raises is raised, after the streams have ended.
    """
    streams = [Stream(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(streams)) as pool:
        done = [pool.submit(_follow, client, stream, max_new_tokens) for stream in streams]
        for stream in streams:
            stream.under_way.wait()
        meanwhile()
    for future in done:
        future.result()
    return streams


def _follow(client: Client, stream: Stream, max_new_tokens: int) -> None:
    try:
        for chunk in client.stream(stream.prompt, max_new_tokens=max_new_tokens, ignore_eos=True):
            stream.token_ids.extend(chunk.token_ids)
            stream.arrived_s.append(time.monotonic())
            stream.finish_reason = chunk.finish_reason
            if len(stream.token_ids) >= WARM_TOKENS:
                stream.under_way.set()
    except RayMoEError as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.under_way.set()


def kill_busiest(client: Client) -> HostStatus:
    """SIGKILL the process of the expert actor that has computed most; returns what it was.

    Raises: `Unavailable` when no actor is ready, or the process is not one that Ray runs for us.
    """
    ready = [host for host in client.status().hosts if host.state == "ready" and host.pid]
    if not ready:
        raise Unavailable("no expert actor is ready to be killed")
    victim = max(ready, key=lambda host: host.num_rows)
    process = psutil.Process(victim.pid)
    ours = os.getpid() in [parent.pid for parent in process.parents()]
    if not ours or not "".join(process.cmdline()).startswith("ray::"):
        raise Unavailable(f"process {victim.pid} is not an actor of this demo; it is left alone")
    process.send_signal(signal.SIGKILL)
    return victim
