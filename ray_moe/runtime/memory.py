"""How much memory of this machine may still be taken: by the system's word, and by that of the container.

Inside a container the system tells of the whole machine; the control group's limit is what ends a process. Reads
files only. Called by the expert actors and `service/cluster.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_UNIFIED = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_bytes(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """What psutil says is available, or less where a control group (version 1 or 2) leaves this process less."""
    return min([psutil.virtual_memory().available, *_left_in_groups(mount, membership)])


def _left_in_groups(mount: Path, membership: Path) -> Iterator[int]:
    """Bytes left below the limit of each group that this process is in: a limit holds for all groups below it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (mount / "memory", _LEGACY) if controllers else (mount, _UNIFIED)
        group = root / path.strip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(root):  # in a container the path may be that of the host, and the root is ours
                yield from _left_in(directory, *names)


def _left_in(group: Path, limit: str, usage: str, caches: tuple[str, ...]) -> Iterator[int]:
    try:
        limit_bytes, used_bytes = int((group / limit).read_text()), int((group / usage).read_text())
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max": no limit
        return
    # Files read before count as usage, and are dropped when memory is short.
    yield max(0, limit_bytes - used_bytes + sum(int(entries.get(name, 0)) for name in caches))
