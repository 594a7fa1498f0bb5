"""The Manager's engine room: an event loop in a thread of its own, and the supervisor on it.

Why it exists: the supervisor is one writer on one loop, and application code calls from any thread
and any loop. It has no reference to the Manager, so that one that nobody refers to any more goes,
and this with it. Called by ``embed.py``. It must not print, and must never keep an interpreter from
its exit.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, NoReturn, TypeVar

from vram_agent import __version__
from vram_agent.cgroup import read_memory_limit_bytes
from vram_agent.config import Settings
from vram_agent.devices.base import Device
from vram_agent.embedding.ending import end_process
from vram_agent.embedding.group import EmbeddedBackend
from vram_agent.embedding.supervisor import EmbeddedSupervisor
from vram_agent.embedding.uses import Ticket
from vram_agent.metrics import AgentMetrics
from vram_agent.protocol import AgentConfig, AgentMode, ControlPolicy, Listen, ModelSpec, Report
from vram_agent.supervision.journal import FileJournal
from vram_agent.supervision.ports import LoopClock, Surroundings

EXIT_SECONDS = 10.0
"""How long the interpreter's exit waits, at most, for open answers and a move that is under way."""
T = TypeVar("T")


class Core:
    """Started when made. Any thread may call, but for the methods that begin with _."""

    def __init__(self, config: AgentConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self._pid = os.getpid()
        # Re-entrant: the garbage collector may run ``request_stop`` in a thread that holds it.
        self._lock = threading.RLock()
        self._is_closed = False
        self._is_exiting = False
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._supervisor: EmbeddedSupervisor
        self._backend: EmbeddedBackend
        self._metrics = AgentMetrics(__version__)
        self._servers: Any = None
        self._fault: BaseException | None = None
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="vram-agent", daemon=True
        )
        self._thread.start()
        started.wait()
        if self._fault is not None:
            raise self._fault
        atexit.register(self.stop_at_exit)

    # --- from any thread

    def ensure_usable(self) -> None:
        """Raise RuntimeError in a fork and after the end."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this Manager belongs to process {self._pid}, and a fork ({os.getpid()}) has "
                f"neither its threads nor its device: make a Manager in each process"
            )
        if self._is_closed:
            self._refuse("this Manager is closed; make a new one")

    def ask(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin work on the loop. Raises RuntimeError after the end."""
        with self._lock:
            self.ensure_usable()
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work on the loop and return its result. Raises RuntimeError after the end."""
        return self.wait(self.ask(work))

    def wait(self, answer: Future[T]) -> T:
        """Block until an answer is there. Raises RuntimeError where the end came first."""
        try:
            return answer.result()
        except CancelledError:
            self._refuse("the Manager was closed meanwhile")

    def _refuse(self, words: str) -> NoReturn:
        """Raise RuntimeError, but in a daemon thread while the interpreter exits.

        Such a thread is about to end wherever it is, and its error would only be printed.
        """
        if self._is_exiting and threading.current_thread().daemon:
            threading.Event().wait()
        raise RuntimeError(words) from None

    def enter(self, ticket: Ticket) -> Future[object]:
        """Begin a use; the future has the object once it is resident.

        Raises RuntimeError in a factory: it would wait for itself.
        """
        if self._backend.workers.factories.is_current():
            raise RuntimeError(
                f"a factory cannot use model {ticket.model}: models are made one at a time; use "
                f"both side by side instead"
            )
        return self.ask(lambda: self._supervisor.uses.enter(ticket))

    def leave(self, ticket: Ticket) -> None:
        """End a use. Never raises: nothing is to be done in a fork or after the end."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._is_closed:
                self._loop.call_soon_threadsafe(self._supervisor.uses.leave, ticket)

    def register(self, spec: ModelSpec, factory: Callable[[], object]) -> None:
        """Add a model. Raises ValueError where there is one of that name."""

        async def register() -> None:
            self._backend.factories.setdefault(spec.name, factory)
            await self._supervisor.register(spec)

        self.call(register)

    def report(self) -> Report:
        """Measure and return the report."""

        async def report() -> Report:
            return self._supervisor.report()

        return self.call(report)

    def serve_control(self, address: str, policy: ControlPolicy) -> str:
        """Listen on the control port; return the address bound.

        Raises ListenError, and RuntimeError where it listens already.
        """

        async def serve() -> str:
            # Not before somebody wants it: it takes as long as everything else together.
            from vram_agent.serving.app import start_control  # noqa: PLC0415

            if self._servers is not None:
                raise RuntimeError(f"the control port is {self._servers.control_address} already")
            config = AgentConfig(listen=Listen(control=address), control=policy)
            pod = Settings.from_environment(os.environ).pod
            self._servers = await start_control(self._supervisor, config, pod, self._metrics)
            bound: str = self._servers.control_address
            return bound

        return self.call(serve)

    def close(self, holder: object, grace_seconds: float) -> None:
        """Take no new uses, give those that go on time to end, drop the models, end the threads.

        Idempotent. Raises RuntimeError where the caller itself uses a model.
        """

        async def drain() -> None:
            if held := self._supervisor.uses.held_by(holder):
                raise RuntimeError(f"close() inside of a use of {', '.join(held)}; leave it first")
            await self._supervisor.stop(grace_seconds)

        if os.getpid() != self._pid:
            return
        if not self._is_closed:
            self.call(drain)
        self.request_stop()
        self._thread.join()
        self._join_workers()

    def request_stop(self) -> None:
        """End soon, without waiting: for a Manager that nobody refers to any more. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._stop.set)

    def stop_at_exit(self) -> None:
        """End at the interpreter's exit: drop nothing, since the process's end does that."""
        self._is_exiting = True
        self.request_stop()
        if os.getpid() == self._pid:
            self._thread.join(EXIT_SECONDS)
            self._join_workers()

    def _join_workers(self) -> None:
        for worker in (self._backend.workers.moves, self._backend.workers.factories):
            worker.join(EXIT_SECONDS)

    # --- the loop's thread

    def _run(self, started: threading.Event) -> None:
        try:
            asyncio.run(self._live(started))
        except BaseException as fault:  # whoever made it waits for the reason
            self._fault = fault
        finally:
            with self._lock:
                self._is_closed = True
            started.set()
            atexit.unregister(self.stop_at_exit)

    async def _live(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        settings = Settings.from_environment(os.environ)
        self._backend = EmbeddedBackend(self._device)
        self._supervisor = EmbeddedSupervisor(
            self._config,
            Surroundings(
                clock=LoopClock(),
                observer=self._metrics,
                journal=FileJournal(settings.state_directory),
                pod=settings.pod,
                version=__version__,
                mode=AgentMode.EMBED,
                host_limit_bytes=read_memory_limit_bytes(),
            ),
        )
        self._backend.uses = self._supervisor.uses
        self._supervisor.attach(self._backend)
        leaving = asyncio.create_task(self._leave_when_told())
        started.set()
        try:
            await self._stop.wait()
        finally:
            # Before the loop ends: whoever asks after this is told, instead of never answered.
            with self._lock:
                self._is_closed = True
            leaving.cancel()
            workers = self._backend.workers
            if self._servers is not None:
                await self._servers.close()
            if not self._is_exiting:
                await self._supervisor.close()
            workers.factories.stop()
            workers.moves.stop()

    async def _leave_when_told(self) -> None:
        await self._supervisor.wait_exit()
        end_process()
