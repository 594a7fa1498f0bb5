"""The calls that a GPU process is given, and what bounds the parts of a result that it sends.

Why it exists: a task that gives parts must hear, while it runs, that they were taken or that nobody
reads any more; whatever else comes meanwhile waits for its turn. Called by gpu.py, in one thread.
"""

from __future__ import annotations

import select
from collections import deque
from typing import Final

import msgspec

from vram_agent.backend import TaskPart
from vram_agent.errors import TaskCancelledError
from vram_agent.processes.channel import Channel, close_fds
from vram_agent.processes.messages import (
    Answer,
    Call,
    Cancel,
    Partial,
    Taken,
    decode_call,
    encode,
    pack_tensors,
)

MAX_UNTAKEN_PARTS: Final = 1024
MAX_UNTAKEN_BYTES: Final = 32 << 20
"""What may lie at the supervisor before the task waits for its reader; one part may be larger.

Minutes of speech: a listener who takes it at its own speed does not hold the model.
"""


class Inbox:
    """Calls in their order. What concerns the stream that runs is noted as it is read."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._calls: deque[tuple[Call, tuple[int, ...]]] = deque()
        self._stream = 0
        self.taken = 0
        self.is_cancelled = False

    def next(self) -> tuple[Call, tuple[int, ...]]:
        """Wait for the next call; the caller owns its descriptors. Raises ChannelClosedError."""
        while not self._calls:
            self.wait()
        return self._calls.popleft()

    def begin(self, stream: int) -> None:
        """Listen for what concerns this stream; 0 for none."""
        self._stream, self.taken, self.is_cancelled = stream, 0, False

    def poll(self) -> None:
        """Read what has come, without waiting. Raises ChannelClosedError."""
        while select.select([self._channel.fileno()], [], [], 0)[0]:
            self.wait()

    def wait(self) -> None:
        """Read one message, waiting for it. Raises ChannelClosedError."""
        packet = self._channel.receive()
        call = decode_call(packet.body)
        if not isinstance(call.request, Taken | Cancel):
            self._calls.append((call, packet.fds))
            return
        close_fds(packet.fds)
        if call.request.stream != self._stream:
            return  # of a stream that has ended
        if isinstance(call.request, Taken):
            self.taken = call.request.parts
        else:
            self.is_cancelled = True


class Outlet:
    """Sends the parts of one task's result, no further ahead of their reader than allowed."""

    def __init__(self, channel: Channel, inbox: Inbox, call: Call) -> None:
        self._channel = channel
        self._inbox = inbox
        self._call_id = call.id
        self._sizes: deque[int] = deque()
        self._forgotten = 0

    def send(self, part: TaskPart) -> None:
        """Send one part, once there is room for it.

        Raises TaskCancelledError where nobody reads any more, and ChannelClosedError.
        """
        headers, fds = pack_tensors(part.tensors)
        nbytes = sum(header.nbytes for header in headers)
        try:
            self._wait_for_room(nbytes)
        except BaseException:
            close_fds(fds)
            raise
        self._sizes.append(nbytes)
        partial = Partial(values=msgspec.to_builtins(dict(part.values)), tensors=headers)
        self._channel.send(encode(Answer(self._call_id, partial)), fds)

    def _wait_for_room(self, nbytes: int) -> None:
        self._inbox.poll()
        while True:
            if self._inbox.is_cancelled:
                raise TaskCancelledError("nobody waits for the rest of this task")
            while self._forgotten < self._inbox.taken:
                self._sizes.popleft()
                self._forgotten += 1
            is_full = len(self._sizes) >= MAX_UNTAKEN_PARTS
            if not self._sizes or not (is_full or sum(self._sizes) + nbytes > MAX_UNTAKEN_BYTES):
                return
            self._inbox.wait()
