"""A service without a model on a free port of the loopback, for clients in environments of their own.

`python -m tests.compat.service` prints its address and goes on until it is ended; `noxfile.py` runs it.
"""

from __future__ import annotations

import asyncio

from tests.unit.service.fake_backend import FakeBackend, front_door


async def serve() -> None:
    async with front_door(FakeBackend()) as target:
        print(target, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
