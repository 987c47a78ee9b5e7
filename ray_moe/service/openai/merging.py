"""Several generations at once, as one stream of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ray_moe.types import GenerateChunk

_Queue = asyncio.Queue[tuple[int, GenerateChunk | Exception | None]]


async def merged(
    generations: Sequence[AsyncGenerator[GenerateChunk, None]],
) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
    """(index of the generation, piece) in the order in which they come.

    The first error of any is raised, which ends the others; so does closing this generator. All of them are closed when
    it ends. A consumer that is slow slows all of them down.
    """
    if len(generations) == 1:
        async with aclosing(generations[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    pieces: _Queue = asyncio.Queue(len(generations))
    pumps = [asyncio.create_task(_pump(index, chunks, pieces)) for index, chunks in enumerate(generations)]
    try:
        num_left = len(pumps)
        while num_left:
            index, piece = await pieces.get()
            if piece is None:
                num_left -= 1
            elif isinstance(piece, Exception):
                raise piece
            else:
                yield index, piece
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(index: int, generation: AsyncGenerator[GenerateChunk, None], pieces: _Queue) -> None:
    try:
        async with aclosing(generation) as chunks:
            async for chunk in chunks:
                await pieces.put((index, chunk))
    except Exception as error:
        await pieces.put((index, error))
    else:
        await pieces.put((index, None))
