"""The arena: what the router lends is never lent twice, always comes back, and can only be mapped by who may."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import tempfile
import threading

import msgpack
import pytest
import torch

from ray_moe.errors import WireError
from ray_moe.transport import shared_memory
from ray_moe.transport.shared_memory import Arena, Slot
from ray_moe.wire import tensors

MIB = 1024 * 1024


def take(arena: Arena, request_bytes: int, room_bytes: int) -> Slot:
    slot = arena.allocate(request_bytes, room_bytes)
    assert slot is not None
    return slot


def used_bytes(arena: Arena) -> int:
    return os.fstat(arena._fd).st_blocks * 512


def test_both_sides_see_the_same_memory() -> None:
    arena = Arena(MIB)
    shared = shared_memory.attach(arena.offer)
    assert shared is not None
    slot = take(arena, 100, 200)
    offset, request_bytes, room_bytes = slot.placement
    assert (offset % 64, request_bytes, room_bytes) == (0, 128, 256)
    slot.request[:5] = b"hello"
    assert bytes(shared[offset : offset + 5]) == b"hello"
    spec = tensors.make_spec(torch.bfloat16, (4, 8))
    rows = torch.randn(4, 8).bfloat16()
    tensors.tensor_at(shared[offset + request_bytes : offset + request_bytes + room_bytes], 0, spec).copy_(rows)
    assert torch.equal(slot.rows(spec), rows)
    with pytest.raises(WireError):
        slot.rows(tensors.make_spec(torch.bfloat16, (5, 32)))


def test_a_slot_is_free_once() -> None:
    arena = Arena(MIB)
    slot = take(arena, MIB, 0)
    assert arena.allocate(64, 0) is None
    slot.release()
    other = take(arena, MIB, 0)
    slot.release()
    del slot
    gc.collect()
    assert arena.allocate(64, 0) is None
    other.release()
    assert arena.is_empty


def test_rows_keep_their_slot_until_the_last_of_them_is_gone() -> None:
    arena = Arena(MIB)
    slot = take(arena, 0, MIB)
    rows = slot.rows(tensors.make_spec(torch.float32, (4, 8)))
    part = rows[1:, 2]
    del slot, rows
    gc.collect()
    assert arena.allocate(0, 64) is None
    del part
    assert arena.is_empty


def test_the_collector_may_strike_while_the_lock_is_held() -> None:
    """A slot can be collected in the middle of `allocate`, in the same thread: that must neither hang nor lose it."""
    arena = Arena(MIB)
    slot = take(arena, 64, 0)
    with arena._ledger._lock:
        slot.release()
    assert arena.is_empty


def test_threads_never_share_a_slot() -> None:
    arena = Arena(MIB)
    failures: list[str] = []

    def work(mark: int) -> None:
        for i in range(300):
            slot = arena.allocate(64 * (1 + (i * mark) % 50), 64 * (i % 3))
            if slot is None:
                continue
            slot.request[:] = bytes([mark]) * len(slot.request)
            if bytes(slot.request) != bytes([mark]) * len(slot.request):
                failures.append(f"thread {mark} lost its bytes")
            if i % 2:
                slot.release()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert arena.is_empty


def test_memory_is_not_taken_before_it_is_used_and_goes_back_after_a_burst() -> None:
    arena = Arena(512 * MIB)
    assert used_bytes(arena) <= mmap.PAGESIZE
    slot = take(arena, 100 * MIB, 0)
    slot.request[:] = bytes(100 * MIB)
    assert used_bytes(arena) >= 100 * MIB
    small = take(arena, 64, 0)
    slot.release()
    assert used_bytes(arena) >= 100 * MIB  # not while anything is lent
    small.release()
    assert used_bytes(arena) <= 64 * MIB + 2 * mmap.PAGESIZE


def test_nothing_is_left_when_both_sides_let_go() -> None:
    def num_maps() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:ray-moe" in line for line in maps)

    before = num_maps()
    arena = Arena(MIB)
    shared = shared_memory.attach(arena.offer)
    slot = take(arena, 0, 64)
    assert num_maps() == before + 2
    arena.close_file()
    arena.close_file()
    del arena
    assert num_maps() == before + 2  # a slot is still lent
    del slot
    assert num_maps() == before + 1
    del shared
    assert num_maps() == before


def test_it_cannot_shrink_under_the_other_side() -> None:
    arena = Arena(MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(arena._fd, 4096)


def changed(arena: Arena, **changes: object) -> bytes:
    """The offer of `arena` with other fields."""
    pid, fd, size, nonce = msgpack.unpackb(arena.offer)
    packed: bytes = msgpack.packb(list(({"pid": pid, "fd": fd, "size": size, "nonce": nonce} | changes).values()))
    return packed


@pytest.mark.parametrize(
    "offer", [None, "text", b"", b"\xc1", b"\x81\x91\x01\x01", msgpack.packb([1, 2, 3]), msgpack.packb({})]
)
def test_what_is_no_offer_is_declined(offer: object) -> None:
    assert shared_memory.attach(offer) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": bytes(32)},  # other memory under the same numbers, as in another container
        {"nonce": b""},
        {"nonce": "text"},
        {"pid": 2**22 + 1},
        {"pid": -1},
        {"pid": "self/../1"},
        {"fd": 10**6},
        {"fd": 0},
        {"size": MIB},
        {"size": 0},
        {"size": 2**62},
        {"size": 2**63},
        {"size": -1},
    ],
)
def test_what_is_not_the_routers_arena_is_declined(changes: dict[str, object]) -> None:
    arena = Arena(MIB)
    assert shared_memory.attach(changed(arena, **changes)) is None
    assert shared_memory.attach(changed(arena)) is not None


def test_files_of_other_kinds_are_declined() -> None:
    """Opening or mapping them could block, or kill the host when they shrink."""
    arena = Arena(MIB)
    unsealed = os.memfd_create("ray-moe", os.MFD_ALLOW_SEALING)
    short = os.memfd_create("ray-moe", os.MFD_ALLOW_SEALING)
    pipe = os.pipe()
    with tempfile.TemporaryFile() as plain:
        plain.truncate(MIB)
        os.ftruncate(unsealed, MIB)
        os.ftruncate(short, 100)
        fcntl.fcntl(short, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        assert shared_memory.attach(changed(arena, fd=plain.fileno(), size=MIB)) is None
        assert shared_memory.attach(changed(arena, fd=unsealed, size=MIB)) is None
        assert shared_memory.attach(changed(arena, fd=short, size=100)) is None
        assert shared_memory.attach(changed(arena, fd=short, size=MIB)) is None
        assert shared_memory.attach(changed(arena, fd=pipe[0])) is None
    for fd in (unsealed, short, *pipe):
        os.close(fd)
