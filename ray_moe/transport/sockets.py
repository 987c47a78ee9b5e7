"""Who is at the other end of a Unix socket, as the kernel says."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, Final, NamedTuple

_CREDENTIALS: Final = struct.Struct("iII")

ROOT: Final = 0


class Peer(NamedTuple):
    """The process that has, or had, the other end when it connected or began to listen."""

    pid: int
    """0 when it cannot be seen from here: it is in another container."""
    uid: int

    @classmethod
    def of(cls, line: Any) -> Peer:
        """`line` is a connected socket, or what an event loop shows of it. Raises `OSError`."""
        pid, uid, _ = _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return cls(pid, uid)

    @property
    def is_trusted(self) -> bool:
        """Whether it belongs to this user or to root. Abstract sockets have no permissions: anybody can take the name
        of a host that died, and anybody can connect."""
        return self.uid in (ROOT, os.geteuid())

    @property
    def is_stopped(self) -> bool:
        """Whether it has been stopped (SIGSTOP, a debugger). False when it cannot be told."""
        if not self.pid:
            return False
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] in b"Tt"
        except OSError:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"
