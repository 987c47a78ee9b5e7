"""Shared memory of a GPU, with memory of the CPU in its place; what is particular to CUDA is in `tests/parity`."""

from __future__ import annotations

import gc
import weakref

import msgpack
import pytest
import torch

from ray_moe.errors import HostLost, WireError
from ray_moe.transport import device_memory
from ray_moe.transport.base import ExpertReply
from ray_moe.transport.device_memory import DeviceArena, attach, find
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.stream_transport import StreamTransport
from ray_moe.types import HostAddress
from ray_moe.wire.tensors import make_spec
from tests.unit.transport import device_stand_in
from tests.unit.transport.hosts import NODE, TOKEN, HostProcess, ask, call

CPU = torch.device("cpu")
HIDDEN = make_spec(torch.float32, (4, 8))
ON_THE_GPU = TransportSettings(device="cpu", device_arena_bytes=2**20)


@pytest.fixture(autouse=True)
def stand_in() -> None:
    device_stand_in.install()


def test_what_one_side_writes_the_other_reads() -> None:
    arena = DeviceArena(2**16, CPU)
    memory = attach(arena.offer, CPU)
    assert memory is not None
    slot = arena.allocate((HIDDEN, None), 32)
    assert slot is not None
    hidden, grad = slot.request
    assert hidden is not None
    assert grad is None
    hidden.copy_(torch.arange(32.0).view(4, 8))
    (seen, _), specs, room = find(memory, list(slot.placement))
    assert seen is not None
    assert torch.equal(seen, hidden)
    assert specs == [HIDDEN, None]
    room[:8].view(torch.float32).copy_(torch.tensor([1.5, -2.0]))
    assert slot.rows(make_spec(torch.float32, (1, 2))).tolist() == [[1.5, -2.0]]


def test_a_slot_is_free_when_it_is_released_or_nobody_has_it() -> None:
    arena = DeviceArena(2**12, CPU)
    first = arena.allocate((HIDDEN, None), 3500)
    assert first is not None
    assert arena.allocate((HIDDEN, None), 3500) is None
    first.release()
    first.release()
    second = arena.allocate((HIDDEN, None), 3500)
    assert second is not None
    reply = ExpertReply(second.rows(HIDDEN), second.release)
    del first, second
    assert not arena.ledger.is_empty  # the reply has it
    del reply
    gc.collect()
    assert arena.ledger.is_empty


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
        ({0: -64}, "no GPU memory is shared"),
        ({0: 2**20}, "no GPU memory is shared"),
        ({2: 2**20}, "no GPU memory is shared"),
        ({1: 64}, "these tensors need 128 bytes"),
        ({1: True}, "a place in GPU memory is"),
        ({3: "text"}, "a place in GPU memory is"),
        ({3: b"\0" * 64}, "msgpack"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(change: dict[int, object], complaint: str) -> None:
    arena = DeviceArena(2**12, CPU)
    slot = arena.allocate((HIDDEN, None), 64)
    assert slot is not None
    placement = [change.get(number, field) for number, field in enumerate(slot.placement)]
    with pytest.raises(WireError, match=complaint):
        find(arena.memory, placement)
    with pytest.raises(WireError, match="no GPU memory is shared"):
        find(None, list(slot.placement))


def test_a_reply_larger_than_its_room_is_refused() -> None:
    slot = DeviceArena(2**12, CPU).allocate((HIDDEN, None), 64)
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
    assert len(made) == 6  # by socket and by gRPC
    assert [memory() for memory in made] == [None] * 6


def test_without_a_gpu_none_of_it_can_be_shared(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OSError, match="torch sees no GPU here"):
        device_memory._cuda()
