"""Messages cut into frames and put together, in any order of interleaving, and frames that are none."""

from __future__ import annotations

import random
import struct
from itertools import cycle, zip_longest

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
            assert len(frame) == 24 + chunk_bytes
    assert received == dict(enumerate(messages))


def test_a_long_message_arrives_in_writable_memory() -> None:
    assembler = frames.Assembler(1000)
    done = [assembler.feed(frame) for frame in frames.cut(5, [bytes(100)], 100, 40)]
    assert done[:-1] == [None, None]
    assert done[-1] is not None and done[-1][0] == 5 and not done[-1][1].readonly


def prefix(message_id: int, num_bytes: int, length: int) -> bytes:
    return struct.pack("<QQQ", message_id, num_bytes, length)


@given(
    st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=6),
    st.integers(1, 64),
    st.integers(24, 100),
    st.lists(st.integers(1, 150), min_size=1, max_size=8),
)
def test_a_stream_may_be_received_in_any_pieces(
    messages: list[bytes], chunk_bytes: int, buffer_bytes: int, pieces: list[int]
) -> None:
    cuts = [frames.cut(number, [message], len(message), chunk_bytes) for number, message in enumerate(messages)]
    sent = b"".join(frame for turn in zip_longest(*cuts) for frame in turn if frame is not None)
    stream = frames.ByteStream(1000, buffer_bytes)
    received: dict[int, bytes] = {}
    for piece in cycle(pieces):
        if not sent:
            break
        space = stream.space()
        taken = min(piece, len(space), len(sent))
        assert taken > 0
        space[:taken], sent = sent[:taken], sent[taken:]
        for message_id, message in stream.received(taken):
            assert not message.readonly
            received[message_id] = bytes(message)
    assert received == dict(enumerate(messages))


@pytest.mark.parametrize(
    "stream",
    [
        [b""],
        [b"x" * 24],
        [prefix(1, 4, 3) + b"four"],
        [prefix(1, 3, 4) + b"four"],
        [prefix(1, 0, 1) + b"x"],
        [prefix(1, 1001, 1) + b"x"],
        [prefix(1, 2**64 - 1, 1) + b"x"],
        [prefix(1, 4, 2) + b"ab", prefix(1, 5, 2) + b"cd"],
        [prefix(1, 4, 2) + b"ab", prefix(1, 4, 3) + b"cde"],
        [prefix(1, 4, 2) + b"ab", prefix(1, 2, 2) + b"cd"],
    ],
)
def test_nonsense_is_refused(stream: list[bytes]) -> None:
    assembler = frames.Assembler(1000)
    with pytest.raises(WireError):
        for frame in stream:
            assembler.feed(frame)


@pytest.mark.parametrize(
    "sent",
    [
        prefix(1, 0, 0),
        prefix(1, 4, 0),
        prefix(1, 3, 4),
        prefix(1, 1001, 1),
        prefix(1, 2**64 - 1, 2**64 - 1),
        prefix(1, 4, 2) + b"ab" + prefix(1, 5, 2),
        prefix(1, 4, 2) + b"ab" + prefix(1, 4, 3),
    ],
)
def test_nonsense_in_a_stream_is_refused_before_it_is_received(sent: bytes) -> None:
    stream = frames.ByteStream(1000)
    stream.space()[: len(sent)] = sent
    with pytest.raises(WireError):
        list(stream.received(len(sent)))


def test_an_announcement_alone_takes_no_memory() -> None:
    """Forty messages of 1 GiB are begun on a machine that has no memory for one of them to be touched, times forty."""
    assembler = frames.Assembler(2**33)
    for message_id in range(40):
        assert assembler.feed(prefix(message_id, 2**30, 1) + b"x") is None
