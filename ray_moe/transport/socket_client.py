"""A Unix stream socket to a host of this machine, for a `StreamConnection`.

The thread that submits a call writes it to the socket. Who waits for the answer may read it there; a thread of the
connection reads what nobody waits for so, and sees when the line breaks. Nothing waits for the host to read: what the
socket does not take at once is sent by a thread that lives until it has caught up.

There are no pings. The socket of a host that died is closed by the kernel, and of one that is silent the kernel knows
whether it has been stopped. So one that is only busy, with its event loop or with all of Python, is never taken for
lost. That a host answers nothing for other reasons is found by those who wait for it (`runtime/lines.py`).
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Sequence

from ray_moe.transport import frames
from ray_moe.transport.connection import LineEnded, Received
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
        self._bytes = frames.ByteStream(settings.max_message_bytes)
        self._reading = threading.Lock()
        """Held from the bytes that came until everybody has been told."""
        self._outbox = Outbox()
        self._sending = threading.Lock()
        self._writer: threading.Thread | None = None
        """While there is more to send than the socket takes; guarded by _sending, as is who may write."""

    def open(self, hello: Hello, received: Received) -> None:
        self._received = received
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect("\0" + self.target)
            self._peer = Peer.of(self._socket)
            if not self._peer.is_trusted:  # it must not hear the token
                self.is_distrusted = True
                raise LineEnded(f"the socket belongs to {self._peer}, and this is another user")
            message = write_hello(hello)
            self._socket.sendall(frames.frame(HELLO_ID, (message,), len(message)), socket.MSG_NOSIGNAL)
            self._watch = select.epoll()
            self._watch.register(self._socket, select.EPOLLRDHUP | select.EPOLLIN)
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

    def listen(self) -> None:
        try:
            while True:
                if self._watch.poll(self._settings.ping_interval_s):
                    if not self.take_in():
                        return
                elif self._peer.is_stopped and self._stays_stopped():
                    raise LineEnded(f"{self._peer} is stopped")
        finally:
            self.close()
            with self._sending:
                writer = self._writer
            if writer is not None:
                writer.join()
            with self._sending, self._reading:  # nobody is about to use a file that has got its number
                self._watch.close()
                self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_listening(self, is_on: bool) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is over
            self._watch.modify(self._socket, select.EPOLLRDHUP | (select.EPOLLIN if is_on else 0))

    def take_in(self) -> bool:
        with self._reading:
            while True:
                space = self._bytes.space()
                try:
                    num_bytes = self._socket.recv_into(space, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return True
                except OSError:
                    return False
                if not num_bytes:
                    return False
                for message_id, message in self._bytes.received(num_bytes):
                    self._received(message_id, message)
                if num_bytes < len(space):  # as a rule there is no more
                    return True

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

    def _stays_stopped(self) -> bool:
        heard = select.poll()
        heard.register(self._socket, select.POLLIN)
        return not heard.poll(self._settings.ping_timeout_s * 1000) and self._peer.is_stopped
