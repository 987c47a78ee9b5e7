"""Messages cut into frames and put together, in any order of interleaving, and frames that are none."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_moe.errors import WireError
from ray_moe.transport import frames
from ray_moe.wire.tensors import Buffer


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=6), st.integers(1, 64), st.integers())
def test_interleaved_messages_come_back(messages: list[bytes], chunk_bytes: int, seed: int) -> None:
    rng = random.Random(seed)
    cuts = []
    for message_id, message in enumerate(messages):
        middle = rng.randint(0, len(message))
        parts: list[Buffer] = [message[:middle], memoryview(message)[middle:], b""]
        cuts.append(frames.cut(message_id, parts, len(message), chunk_bytes))
    assembler = frames.Assembler(1000)
    received = {}
    while cuts:
        frame = next(turn := rng.choice(cuts), None)
        if frame is None:
            cuts.remove(turn)
        elif (done := assembler.feed(frame)) is not None:
            received[done[0]] = bytes(done[1])
        else:
            assert len(frame) == 16 + chunk_bytes
    assert received == dict(enumerate(messages))


def test_a_long_message_arrives_in_writable_memory() -> None:
    assembler = frames.Assembler(1000)
    done = [assembler.feed(frame) for frame in frames.cut(5, [bytes(100)], 100, 40)]
    assert done[:-1] == [None, None]
    assert done[-1] is not None and done[-1][0] == 5 and not done[-1][1].readonly


def prefix(message_id: int, num_bytes: int) -> bytes:
    return struct.pack("<QQ", message_id, num_bytes)


@pytest.mark.parametrize(
    "stream",
    [
        [b""],
        [b"x" * 16],
        [prefix(1, 3) + b"four"],
        [prefix(1, 0) + b"x"],
        [prefix(1, 1001) + b"x"],
        [prefix(1, 2**64 - 1) + b"x"],
        [prefix(1, 4) + b"ab", prefix(1, 5) + b"cd"],
        [prefix(1, 4) + b"ab", prefix(1, 4) + b"cde"],
        [prefix(1, 4) + b"ab", prefix(1, 2) + b"cd"],
    ],
)
def test_nonsense_is_refused(stream: list[bytes]) -> None:
    assembler = frames.Assembler(1000)
    with pytest.raises(WireError):
        for frame in stream:
            assembler.feed(frame)


def test_an_announcement_alone_takes_no_memory() -> None:
    """Forty messages of 1 GiB are begun on a machine that has no memory for one of them to be touched, times forty."""
    assembler = frames.Assembler(2**33)
    for message_id in range(40):
        assert assembler.feed(prefix(message_id, 2**30) + b"x") is None
