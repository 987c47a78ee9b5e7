"""A Unix stream socket to a host of this machine, for a `StreamConnection`.

The thread that submits a call writes it to the socket; a thread of the connection reads. Nothing waits for the host to
read: what the socket does not take at once is sent by a thread that lives until it has caught up.

There are no pings. The socket of a host that died is closed by the kernel, and of one that is silent the kernel knows
whether it has been stopped. So one that is only busy, with its event loop or with all of Python, is never taken for
lost. That a host answers nothing for other reasons is found by those who wait for it (`runtime/lines.py`).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

from ray_moe.transport import frames
from ray_moe.transport.connection import LineEnded
from ray_moe.transport.hello import HELLO_ID, Hello, write_hello
from ray_moe.transport.outbox import Outbox
from ray_moe.transport.settings import TransportSettings
from ray_moe.transport.sockets import Peer
from ray_moe.wire.tensors import Buffer


class SocketCarrier:
    """The socket to the host that listens at the abstract name `target`."""

    is_encrypted = False

    def __init__(self, target: str, settings: TransportSettings) -> None:
        self.target = target
        self.is_distrusted = False
        self._settings = settings
        self._outbox = Outbox()
        self._sending = threading.Lock()
        self._writer: threading.Thread | None = None
        """While there is more to send than the socket takes; guarded by _sending, as is who may write."""

    def open(self, hello: Hello) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect("\0" + self.target)
            self._peer = Peer.of(self._socket)
            if not self._peer.is_trusted:  # it must not hear the token
                self.is_distrusted = True
                raise LineEnded(f"the socket belongs to {self._peer}, and this is another user")
            message = write_hello(hello)
            self._socket.sendall(frames.frame(HELLO_ID, (message,), len(message)), socket.MSG_NOSIGNAL)
            interval_s = self._settings.ping_interval_s
            seconds = struct.pack("@ll", int(interval_s), int(interval_s % 1 * 1e6) or 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        except OSError as error:
            self._socket.close()
            raise LineEnded(f"{error.strerror or error}") from None
        except LineEnded:
            self._socket.close()
            raise

    def send(self, message_id: int, buffers: Sequence[Buffer], num_bytes: int) -> None:
        with self._sending:
            if num_bytes > self._settings.chunk_bytes:
                self._outbox.put(frames.cut(message_id, buffers, num_bytes, self._settings.chunk_bytes))
            else:
                frame = frames.frame(message_id, buffers, num_bytes)
                if self._writer is None and not (frame := self._send_now(frame)):
                    return
                self._outbox.put(frame)
            if self._writer is None:
                self._writer = threading.Thread(target=self._catch_up, name=f"sends-{self.target}", daemon=True)
                try:
                    self._writer.start()
                except RuntimeError:  # no more threads: what was begun cannot be ended, so nothing can follow
                    self._writer = None
                    self.close()

    def messages(self) -> Iterator[tuple[int, memoryview]]:
        stream = frames.ByteStream(self._settings.max_message_bytes)
        try:
            while num_bytes := self._receive(stream.space()):
                yield from stream.received(num_bytes)
        finally:
            self.close()
            with self._sending:
                writer = self._writer
            if writer is not None:
                writer.join()
            with self._sending:  # nobody is about to write to a file that has got its number
                self._socket.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was never open, or is closed
            self._socket.shutdown(socket.SHUT_RDWR)

    # --- Sending ---------------------------------------------------------------------------------------------
    def _send_now(self, frame: bytes) -> bytes:
        """Send what the socket takes; returns the rest."""
        try:
            return frame[self._socket.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return frame
        except OSError:  # it is over, which the reader finds as well
            return b""

    def _catch_up(self) -> None:
        while True:
            with self._sending:
                frame = self._outbox.take(block=False)
                if frame is None:
                    self._writer = None
                    return
            try:
                self._socket.sendall(frame, socket.MSG_NOSIGNAL)
            except OSError:
                return  # it is over, and so is whatever still waits

    # --- Receiving -------------------------------------------------------------------------------------------
    def _receive(self, space: memoryview) -> int:
        """Bytes that came into `space`; 0 at the end."""
        while True:
            try:
                return self._socket.recv_into(space)
            except BlockingIOError:  # ping_interval_s of silence
                if self._peer.is_stopped and self._stays_stopped():
                    raise LineEnded(f"{self._peer} is stopped") from None
            except OSError:
                return 0

    def _stays_stopped(self) -> bool:
        heard = select.poll()
        heard.register(self._socket, select.POLLIN)
        return not heard.poll(self._settings.ping_timeout_s * 1000) and self._peer.is_stopped
