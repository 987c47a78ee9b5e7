"""Shared memory of a GPU, with memory of the CPU in its place; what is particular to CUDA is in `tests/parity`."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import msgpack
import pytest
import torch

from ray_moe.errors import HostLost, WireError
from ray_moe.transport import device_memory
from ray_moe.transport.base import ExpertReply
from ray_moe.transport.device_memory import DeviceArena, DeviceSlot, attach, find
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from ray_moe.wire.tensors import make_spec
from tests.unit.transport import device_stand_in
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, ask, call

CPU = torch.device("cpu")
HIDDEN = make_spec(torch.float32, (4, 8))
ONE = (HIDDEN, None, None, None)
"""The tensors of a call that has only tokens."""
ON_THE_GPU = TransportSettings(device="cpu", device_arena_bytes=2**20)


@pytest.fixture(autouse=True)
def stand_in() -> None:
    device_stand_in.install()


def is_free(arena: DeviceArena) -> bool:
    """Whether nothing of it is taken."""
    gc.collect()
    return arena.ledger.is_empty


def told(slot: DeviceSlot) -> list[Any]:
    """Its place as it comes out of a message."""
    return [list(slot.placement[0]), *slot.placement[1:]]


def test_what_one_side_writes_the_other_reads() -> None:
    arena = DeviceArena(2**16, CPU)
    memory = attach(arena.offer, CPU)
    assert memory is not None
    slot = arena.allocate(ONE, 32)
    assert slot is not None
    hidden, *others = slot.request or []
    assert hidden is not None
    assert others == [None] * 3
    hidden.copy_(torch.arange(32.0).view(4, 8))
    (seen, *others), room = find(memory, told(slot), slot.specs)
    assert others == [None] * 3
    assert seen is not None
    assert torch.equal(seen, hidden)
    room[:8].view(torch.float32).copy_(torch.tensor([1.5, -2.0]))
    assert slot.rows(make_spec(torch.float32, (1, 2))).tolist() == [[1.5, -2.0]]


def test_a_slot_is_free_when_it_is_released_or_nobody_has_it() -> None:
    arena = DeviceArena(2**12, CPU)
    first = arena.allocate(ONE, 3500)
    assert first is not None
    assert arena.allocate(ONE, 3500) is None
    first.release()
    first.release()
    second = arena.allocate(ONE, 3500)
    assert second is not None
    reply = ExpertReply(second.rows(HIDDEN), second.release)
    del first, second
    assert not is_free(arena)  # the reply has it
    del reply
    assert is_free(arena)


@pytest.mark.parametrize(
    "offer",
    [
        None,
        b"",
        b"\xc1",
        msgpack.packb((b"short", 100)),
        msgpack.packb((b"x" * 64, -1)),
        msgpack.packb((b"x" * 64, "many")),
        msgpack.packb((b"x" * 64, 100)),
        msgpack.packb(7),
    ],
)
def test_an_offer_that_makes_no_sense_is_declined(offer: bytes | None) -> None:
    assert attach(offer, CPU) is None


def test_a_host_without_a_gpu_declines() -> None:
    assert attach(DeviceArena(2**12, CPU).offer, None) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({0: [-64, None, None, None]}, "no GPU memory is shared"),
        ({0: [2**20, None, None, None]}, "no GPU memory is shared"),
        ({0: [3, None, None, None]}, "no torch.float32 begins at byte 3"),
        ({0: [0]}, "1 offsets in GPU memory do not fit 4 tensors"),
        ({0: [0, 0, None, None]}, "an offset in GPU memory is a number, of a tensor that the call has"),
        ({0: [True, None, None, None]}, "an offset in GPU memory is a number"),
        ({0: 0}, "a place in GPU memory is"),
        ({1: -64}, "no GPU memory is shared"),
        ({2: 2**20}, "no GPU memory is shared"),
        ({2: -1}, "no GPU memory is shared"),
        ({1: True}, "a place in GPU memory is"),
        ({2: "text"}, "a place in GPU memory is"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(change: dict[int, object], complaint: str) -> None:
    arena = DeviceArena(2**12, CPU)
    slot = arena.allocate(ONE, 64)
    assert slot is not None
    with pytest.raises(WireError, match=complaint):
        find(arena.memory, [change.get(number, field) for number, field in enumerate(told(slot))], ONE)
    with pytest.raises(WireError, match="no GPU memory is shared"):
        find(None, told(slot), ONE)


def test_the_parts_of_a_sheet_share_its_tokens_and_keep_all_of_it() -> None:
    arena = DeviceArena(2**12, CPU)
    sheet = arena.sheet(HIDDEN, 6)
    assert sheet is not None
    sheet.hidden.copy_(torch.arange(32.0).view(4, 8))
    sheet.token.copy_(torch.tensor([3, 0, 2, 1, 1, 0]))
    parts = [sheet.part(0, 2), sheet.part(2, 6)]
    for part, mine in zip(parts, ([3, 0], [2, 1, 1, 0]), strict=True):
        assert part.request is None
        (hidden, token, *_), room = find(arena.memory, told(part), part.specs)
        assert hidden is not None
        assert token is not None
        assert torch.equal(hidden, sheet.hidden)
        assert token.tolist() == mine
        room.view(torch.float32).view(-1, 8).copy_(hidden[token])
        assert torch.equal(part.rows(make_spec(torch.float32, (len(mine), 8))), hidden[token])
        with pytest.raises(WireError, match="where it was offered"):
            part.rows(make_spec(torch.float32, (len(mine) + 1, 8)))
    late = parts.pop()
    parts[0].release()
    del sheet, parts, part
    assert not is_free(arena)  # who is late still writes
    late.release()
    assert is_free(arena)
    assert arena.sheet(make_spec(torch.float32, (40, 8)), 200) is None


def test_what_a_lost_host_was_offered_is_not_given_away_at_once(host: HostProcess, connect, monkeypatch) -> None:
    monkeypatch.setattr(device_memory, "_LINGER_S", 2.0)
    connection = connect(host, settings=ON_THE_GPU)
    arena = connection.device_arena
    assert arena is not None
    future = connection.submit(call("sleep:1", torch.randn(4, 8)))
    connection.close()
    with pytest.raises(HostLost):
        future.result(5)
    assert not is_free(arena)
    end_by = time.monotonic() + 10
    while not is_free(arena):
        assert time.monotonic() < end_by
        time.sleep(0.05)


def test_one_memory_is_shared_with_all_hosts_and_goes_with_the_last_line(host: HostProcess, monkeypatch) -> None:
    monkeypatch.setattr(device_memory, "_LINGER_S", 0.1)
    transport = StreamTransport(TOKEN, node_id=NODE, settings=ON_THE_GPU)
    lines = [transport.connect(host.address) for _ in range(3)]
    assert len({id(line.device_arena) for line in lines}) == 1
    arena = lines[0].device_arena
    assert arena is not None
    first = weakref.ref(arena)
    hidden = torch.randn(3, 8)
    for line in lines:
        assert torch.equal(ask(line, "echo", hidden), -hidden)
    lines.pop().close()
    assert transport.connect(host.address).device_arena is first()
    del line, lines, arena
    transport.close()
    gc.collect()
    assert first() is None


def test_a_reply_larger_than_its_room_is_refused() -> None:
    slot = DeviceArena(2**12, CPU).allocate(ONE, 64)
    assert slot is not None
    with pytest.raises(WireError, match="128 bytes where it was offered 64"):
        slot.rows(HIDDEN)


def test_what_does_not_fit_goes_another_way(host: HostProcess, connect) -> None:
    connection = connect(host, settings=ON_THE_GPU)
    assert connection.shares_device_memory
    for num_tokens in (1, 100, 40_000):  # the last has 5 MB
        hidden = torch.randn(num_tokens, 32)
        assert torch.equal(ask(connection, "echo", hidden), -hidden)
    many = [connection.submit(call("echo", torch.full((2000, 32), float(number)))) for number in range(12)]
    for number, future in enumerate(many):
        reply = future.result(60)
        assert torch.equal(reply.rows, torch.full((2000, 32), -float(number)))
        reply.release()


def test_a_router_without_room_on_its_gpu_goes_on_without(host: HostProcess, connect, monkeypatch, caplog) -> None:
    def fail(num_bytes: int, device: torch.device) -> None:
        raise OSError("CUDA says cudaErrorMemoryAllocation")

    monkeypatch.setattr(device_memory, "make_memory", fail)
    connection = connect(host, settings=ON_THE_GPU)
    assert not connection.shares_device_memory
    assert "cudaErrorMemoryAllocation" in caplog.text
    hidden = torch.randn(3, 8)
    assert torch.equal(ask(connection, "echo", hidden), -hidden)


def test_a_host_that_cannot_be_reached_costs_no_memory_however_often_it_is_tried(monkeypatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def make_memory(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, bytes]:
        memory, handle = device_stand_in.make_memory(num_bytes, device)
        made.append(weakref.ref(memory))
        return memory, handle

    monkeypatch.setattr(device_memory, "make_memory", make_memory)
    address = HostAddress("expert-0", "1", NODE, 1, "127.0.0.1:9", "ray-moe-nobody")
    transport = StreamTransport(TOKEN, node_id=NODE, settings=ON_THE_GPU)
    for _ in range(3):
        with pytest.raises(HostLost, match="cannot be reached"):
            transport.connect(address)
    gc.collect()
    assert made
    assert not any(memory() is not None for memory in made)


def test_without_a_gpu_none_of_it_can_be_shared(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OSError, match="torch sees no GPU here"):
        device_memory._cuda()
