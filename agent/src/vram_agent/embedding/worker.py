"""A daemon thread that runs what it is given, one after the other.

Why it exists: moving weights and loading models block, and the event loop of the Manager must not.
One thread of its own, since a pool's threads are waited for when the interpreter exits, and since
OpenMP keeps a team of threads for each thread that calls it. Called on the Manager's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Worker:
    """The thread starts with its first job. It holds on to no job that has ended."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Return what the work returns, or raise what it raises.

        Cancelling gives up the answer; the work runs to its end.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except BaseException as fault:  # whatever it is, it is the caller's
                _tell(loop, _fail, answer, fault)
            else:
                _tell(loop, _succeed, answer, result)

        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return await answer

    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End the thread after the jobs that it has. Idempotent."""
        self._jobs.put(None)

    def join(self, timeout_seconds: float) -> None:
        """Wait for the end of a thread that was stopped."""
        if self._thread is not None and not self.is_current():
            self._thread.join(timeout_seconds)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            # Not while it waits for the next one: a job holds the model that it moved.
            del job


def _tell(
    loop: asyncio.AbstractEventLoop,
    settle: Callable[[asyncio.Future[T], U], None],
    answer: asyncio.Future[T],
    outcome: U,
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who asked
        loop.call_soon_threadsafe(settle, answer, outcome)


def _succeed(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: asyncio.Future[T], fault: BaseException) -> None:
    if not answer.done():
        answer.set_exception(fault)
