"""A host of no experts in a process of its own, for the tests of the transports: what it does is in the layer's name.

``python host_process.py TOKEN INCARNATION [SETTINGS as JSON]`` prints one line of JSON (pid, tcp, unix), serves until
its standard input closes, and ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvloop

from ray_moe import errors
from ray_moe.transport.allocator import tune_malloc
from ray_moe.transport.base import ExpertCall, ExpertReply
from ray_moe.transport.host_server import HostServer
from ray_moe.transport.settings import TransportSettings
from tests.unit.transport import device_stand_in

_threads = ThreadPoolExecutor(4)


def num_arenas() -> int:
    """Arenas that are mapped into this process."""
    return sum("ray-moe" in line for line in Path("/proc/self/maps").read_text().splitlines())


async def submit(call: ExpertCall) -> ExpertReply:
    """Negate the rows, after doing what the layer's name says (``what:argument``)."""
    what, _, argument = call.layer.partition(":")
    if what == "sleep":
        await asyncio.sleep(float(argument))
    elif what == "block":
        time.sleep(float(argument))  # noqa: ASYNC251  (an expert that computes in the event loop does just this)
    elif what == "raise":
        raise getattr(errors, argument, RuntimeError)("as asked for")
    elif what == "arenas":
        return ExpertReply(torch.full((call.num_rows, 1), float(num_arenas())))
    elif what == "fields":
        return ExpertReply(torch.tensor([[call.epoch, len(call.experts), len(call.call_id)]], dtype=torch.float64))
    elif what == "copy":
        return ExpertReply(call.hidden.clone())
    elif what == "wide":
        return ExpertReply(call.hidden.repeat(1, 2))
    elif what == "short":
        return ExpertReply(call.hidden[1:])
    elif what == "thread":
        loop = asyncio.get_running_loop()
        return ExpertReply(await loop.run_in_executor(_threads, _slowly, call, float(argument)))
    return ExpertReply(negated(call))


def negated(call: ExpertCall) -> torch.Tensor:
    """What an echoing expert answers, on either side: easy to check, and no bytes of the request themselves."""
    hidden = -call.tokens()
    if call.grad is not None:
        return hidden
    rows = hidden if call.token is None else hidden.index_select(0, call.token)
    if call.weight is None:
        return rows
    token = torch.arange(len(rows)) if call.token is None else call.token
    weighted = rows * call.weight.unsqueeze(1).to(rows.dtype)
    return torch.zeros_like(hidden).index_add_(0, token, weighted)


def _slowly(call: ExpertCall, delay_s: float) -> torch.Tensor:
    time.sleep(delay_s)
    return negated(call)


async def main(token: str, incarnation: str, settings: str = "{}") -> None:
    torch.set_num_threads(1)
    logging.getLogger("ray_moe").setLevel(logging.CRITICAL)  # it fails because it is told to
    tune_malloc()
    device_stand_in.install()
    server = HostServer(submit, token, incarnation=incarnation, settings=TransportSettings(**json.loads(settings)))
    tcp, unix = await server.start()
    sys.stdout.write(json.dumps({"pid": os.getpid(), "tcp": tcp, "unix": unix}) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))  # as Ray's actors do
