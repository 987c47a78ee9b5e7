"""Memory of a GPU where there is none: on the device "cpu", shared through a file without a name.

All but the calls to CUDA is what runs on a GPU; those are tested where there is one (`tests/parity/test_cuda.py`).
"""

from __future__ import annotations

import mmap
import os

import torch

from ray_moe.transport import device_memory

_numbers: list[int] = []


def make_memory(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, bytes]:
    assert device.type == "cpu"
    file = os.memfd_create("stand-in")
    _numbers.append(file)  # open while this process lives
    os.ftruncate(file, num_bytes)
    handle = f"{os.getpid()} {file}".encode().ljust(64)
    return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8), handle


def open_memory(handle: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
    assert device.type == "cpu"
    pid, file = map(int, handle.split())
    with open(f"/proc/{pid}/fd/{file}", "r+b") as opened:
        return torch.frombuffer(mmap.mmap(opened.fileno(), num_bytes), dtype=torch.uint8)


def install() -> None:
    """From now on, in this process."""
    device_memory.make_memory, device_memory.open_memory = make_memory, open_memory
