"""Messages between the supervisor, the templates and the GPU processes.

Why it exists: a Unix SOCK_SEQPACKET socket keeps message borders, so there is no framing, and it
carries file descriptors, so bulk data (tensors, audio) travels in a sealed memfd and never through
the supervisor's heap. Called by child.py (the supervisor's side, on its event loop, no threads)
and by template.py and gpu.py (blocking). It knows bytes and descriptors, not what they mean.

Ownership of descriptors: ``send`` takes those it is given and closes them, whatever happens; who
receives a packet owns its ``fds`` and closes them.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

MAX_INLINE_BYTES = 48 * 1024
_MAX_FDS = 8
_INLINE = b"\x00"
_IN_MEMFD = b"\x01"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class ChannelClosedError(Exception):
    """The peer ended, or the channel was closed on this side."""


class BrokenPacketError(Exception):
    """A packet is not what this module sends: too many descriptors, or a memfd that can change."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One message. The receiver owns ``fds``."""

    body: bytes
    fds: tuple[int, ...] = ()


def open_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected ends; both are close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that this process owns."""
    for fd in fds:
        os.close(fd)


def seal_bytes(parts: Iterable[bytes | memoryview], name: str = "vram-bulk") -> int:
    """Write the parts one after the other to a new memfd, seal it, return its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in parts:
            view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
            while view:
                view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_sealed(fd: int) -> memoryview:
    """Map a sealed memfd copy-on-write; the mapping lives as long as the returned view.

    Does not close ``fd``. Raises BrokenPacketError when the sender could still change its size:
    a file that shrinks under a mapping kills the reader.
    """
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise BrokenPacketError("a memfd came without its seals")
    size = os.fstat(fd).st_size
    if size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))


@contextmanager
def _datagram(body: bytes, fds: Sequence[int]) -> Iterator[tuple[bytes, list[int]]]:
    """Yield what goes on the wire; a body that is too long goes into a memfd, its fd first."""
    if len(body) <= MAX_INLINE_BYTES:
        yield _INLINE + body, list(fds)
        return
    memfd = seal_bytes([body], "vram-message")
    try:
        yield _IN_MEMFD, [memfd, *fds]
    finally:
        os.close(memfd)


def _ancillary(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def _receive(sock: socket.socket) -> Packet:
    """Receive one packet. Raises ChannelClosedError at the end, BlockingIOError for none yet."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            MAX_INLINE_BYTES + 1, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError as error:
        raise ChannelClosedError(str(error)) from error
    fds: list[int] = []
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found = array.array("i")
            found.frombytes(raw[: len(raw) - len(raw) % found.itemsize])
            fds.extend(found)
    if not data:
        close_fds(fds)
        raise ChannelClosedError("the peer ended")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_fds(fds)
        raise BrokenPacketError("a packet was cut off")
    if data[:1] == _INLINE:
        return Packet(data[1:], tuple(fds))
    if not fds:
        raise BrokenPacketError("a packet came without the memfd that holds its body")
    try:
        body = bytes(map_sealed(fds[0]))
    except BaseException:
        close_fds(fds)
        raise
    os.close(fds[0])
    return Packet(body, tuple(fds[1:]))


class Channel:
    """The blocking side, for a process that does one thing at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # noqa: FBT003 - socket's own name
        self._socket = sock

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._socket.fileno()

    def send(self, body: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message and close ``fds``. Blocks while the peer's buffer is full.

        Raises ChannelClosedError when the peer has ended.
        """
        try:
            with _datagram(body, fds) as (data, all_fds):
                self._socket.sendmsg([data], _ancillary(all_fds))
        except OSError as error:
            raise ChannelClosedError(str(error)) from error
        finally:
            close_fds(fds)

    def receive(self) -> Packet:
        """Wait for the next message. Raises ChannelClosedError when the peer has ended."""
        return _receive(self._socket)

    def close(self) -> None:
        """Close this end; the peer sees the end of the channel. Idempotent."""
        self._socket.close()


@dataclass(slots=True)
class _Outgoing:
    body: bytes
    fds: tuple[int, ...] = field(default=())


class AsyncChannel:
    """The event loop's side. Never blocks; all methods and callbacks run on the loop."""

    def __init__(
        self,
        sock: socket.socket,
        on_packet: Callable[[Packet], None],
        on_end: Callable[[], None],
    ) -> None:
        sock.setblocking(False)  # noqa: FBT003 - socket's own name
        self._socket = sock
        self._on_packet = on_packet
        self._on_end = on_end
        self._outgoing: deque[_Outgoing] = deque()
        self._is_waiting_to_write = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self.receive_waiting)

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent."""
        return self._socket.fileno() >= 0

    def send(self, body: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, or queue it while the peer's buffer is full; takes the ``fds``.

        Raises ChannelClosedError when the channel has ended.
        """
        if not self.is_open:
            close_fds(fds)
            raise ChannelClosedError("the channel has ended")
        self._outgoing.append(_Outgoing(body, tuple(fds)))
        if len(self._outgoing) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            first = self._outgoing[0]
            try:
                with _datagram(first.body, first.fds) as (data, fds):
                    self._socket.sendmsg([data], _ancillary(fds))
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._flush)
                self._is_waiting_to_write = True
                return
            except OSError:
                # The reader sees the end too, after the answers that the peer sent before it.
                self._drop_outgoing()
                break
            close_fds(first.fds)
            self._outgoing.popleft()
        if self._is_waiting_to_write:
            self._loop.remove_writer(self._socket.fileno())
            self._is_waiting_to_write = False

    def receive_waiting(self) -> None:
        """Hand on every message that has arrived; at the end close and call ``on_end``."""
        while self.is_open:
            try:
                packet = _receive(self._socket)
            except (BlockingIOError, InterruptedError):
                return
            except (ChannelClosedError, BrokenPacketError, OSError):
                self.close()
                self._on_end()
                return
            self._on_packet(packet)

    def _drop_outgoing(self) -> None:
        for outgoing in self._outgoing:
            close_fds(outgoing.fds)
        self._outgoing.clear()

    def close(self) -> None:
        """Close this end without calling ``on_end``. Idempotent."""
        if self.is_open:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
        self._drop_outgoing()
        self._socket.close()
