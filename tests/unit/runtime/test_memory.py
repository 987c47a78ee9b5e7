"""Memory that may be taken, with control groups written by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ray_moe.runtime.memory import available_bytes

GIB = 2**30
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))


def available(tmp_path: Path, version: int, path: str, groups: dict[str, tuple[str, int, int]]) -> int:
    """With this process in the group `path`, and `groups` of (limit, usage, cached files)."""
    membership = tmp_path / "membership"
    membership.write_text(f"7:cpu,cpuacct:/x\n4:memory:{path}\n0::/\n" if version == 1 else f"0::{path}\n")
    for name, values in groups.items():
        group = tmp_path / "mount" / ("memory" if version == 1 else "") / name
        group.mkdir(parents=True, exist_ok=True)
        limit, usage, stat = NAMES[version]
        (group / limit).write_text(f"{values[0]}\n")
        (group / usage).write_text(f"{values[1]}\n")
        (group / "memory.stat").write_text(f"anon 5\n{stat} {values[2]}\n")
    return available_bytes(tmp_path / "mount", membership)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"a/b": (f"{4 * GIB}", GIB, 0)}, 3 * GIB),
        ({"a/b": (f"{4 * GIB}", 3 * GIB, 2 * GIB)}, 3 * GIB),  # cached files can go
        ({"a/b": (f"{4 * GIB}", 5 * GIB, 0)}, 0),
        ({"a/b": ("max", GIB, 0)}, 8 * GIB),
        ({"a/b": (f"{2**63 - 4096}", GIB, 0)}, 8 * GIB),
        ({"a/b": ("max", GIB, 0), "a": (f"{2 * GIB}", GIB, 0)}, GIB),  # the group above
        ({".": (f"{2 * GIB}", GIB, 0)}, GIB),  # a container that sees its own group as the root
        ({}, 8 * GIB),
    ],
)
def test_a_limit_of_a_group_is_respected(
    tmp_path: Path, version: int, groups: dict[str, tuple[str, int, int]], expected: int
) -> None:
    assert available(tmp_path, version, "/a/b", groups) == expected


def test_without_control_groups_the_system_tells(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path / "none") == 8 * GIB
