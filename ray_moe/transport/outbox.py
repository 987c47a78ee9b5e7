"""Frames that wait to be sent on one line: short messages pass long ones, which take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue


class Outbox:
    """Any thread may put; one takes."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[bytes | Iterator[bytes] | None] = SimpleQueue()
        self._long: deque[Iterator[bytes]] = deque()

    def put(self, message: bytes | Iterator[bytes]) -> None:
        """Send `message` when its turn comes: a frame, or the frames of a long one."""
        self._waiting.put(message)

    def close(self) -> None:
        """Let who waits for a frame go."""
        self._waiting.put(None)

    def take(self, block: bool) -> bytes | None:
        """The next frame. None once it is closed, and, unless it is to `block`, while there is none."""
        while True:
            try:
                message = self._waiting.get(block and not self._long)
            except Empty:
                if not self._long:
                    return None
            else:
                if message is None or isinstance(message, bytes):
                    return message
                self._long.append(message)
            turn = self._long.popleft()
            frame = next(turn, None)
            if frame is not None:
                self._long.append(turn)
                return frame
