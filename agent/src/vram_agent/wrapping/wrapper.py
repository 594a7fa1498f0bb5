"""A wrapped application as a ``ModelServer``: report, drain, recycle, restart.

Why it exists: the operator speaks to one kind of agent. An application has no models, so what
concerns one is refused with 501 and the ladder takes its next step; what concerns the agent as a
whole is the same as in serve mode, by the same ``Actions`` and ``Drain``. Called by serving/ and by
run.py. It is the only writer of what the application is told.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Never
from uuid import uuid4

import structlog

from vram_agent.backend import Task, TaskResult
from vram_agent.devices.base import Device
from vram_agent.errors import DrainingError, NoSuchModelError, NotSupportedError
from vram_agent.metrics import UNKNOWN_MODEL
from vram_agent.parts import Parts
from vram_agent.protocol import (
    ActionReport,
    ActionStep,
    AgentConfig,
    AgentIdentity,
    ModelReport,
    OffloadTier,
    Report,
    RestartRequest,
)
from vram_agent.serving.base import ModelView
from vram_agent.supervision.actions import CALL, STOP, Acting, Actions, Drain
from vram_agent.supervision.ports import Surroundings, format_time
from vram_agent.supervision.reaper import list_ended_children, reap
from vram_agent.wrapping.keeper import Keeper
from vram_agent.wrapping.measuring import Meter
from vram_agent.wrapping.probes import Probes
from vram_agent.wrapping.watch import Watch

END_SECONDS: Final = 5.0
"""Left for the application to end after SIGTERM, however long its drain took."""
_READY_PATIENCE_SECONDS: Final = 20.0
"""How long a recycle waits for the new process to be ready. A slow one is done before that: the
operator goes by the pod's readiness from there."""
_log = structlog.get_logger("vram_agent.run")


class Wrapper:
    """An agent that wraps a command; a ``ModelServer``. Make it and call it on one event loop."""

    def __init__(
        self, command: Sequence[str], config: AgentConfig, surroundings: Surroundings
    ) -> None:
        self._config = config
        self._surroundings = surroundings
        self._clock = surroundings.clock
        self._probes = Probes()
        self._keeper = Keeper(command, config.run.after_crash, self._clock)
        self._keeper.on_start = self._note_start
        self._keeper.on_crash = lambda: self._observe("Crash")
        self._watch = Watch(config.run, self._keeper, self._probes, self._clock)
        self._drain = Drain()
        self._exit = asyncio.Event()
        self._actions = Actions(
            surroundings,
            self._drain,
            Acting(cut=self._cut, recycle=self._recycle, leave=self._exit.set),
        )
        self._act_by = 0.0
        self._is_held = False  # by a call of /drain, which a new process has to be told too
        self._hook: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._boot_id = uuid4().hex
        self._started_at = format_time(self._clock.now())
        self._sequence = 0

    async def keep(self, device: Device) -> int:
        """Run the command until it or the agent is to end; return the exit code to end with.

        Raises CannotStartError.
        """
        self._watch.meter = Meter(device)
        self._spawn(self._watch.keep_looking())
        if self._watch.has_probe:
            self._spawn(self._watch.keep_asking())
        return await self._keeper.keep()

    async def wait_exit(self) -> None:
        """Return when a ``restart`` has drained and PID 1 is to exit."""
        await self._exit.wait()

    async def stop(self, number: signal.Signals, grace_seconds: float) -> None:
        """Drain and end the application within the grace; ``keep`` then returns.

        The hook has all of it but END_SECONDS (half where there is less), SIGTERM has the rest.
        """
        end_by = self._clock.monotonic() + grace_seconds
        await self._actions.close()
        self._begin_drain(STOP)
        reserve = min(END_SECONDS, grace_seconds / 2)
        if not await self._drain.wait(grace_seconds - reserve):
            _log.warning("cut", what=self._cut())
        await self._keeper.end(number, end_by - self._clock.monotonic())

    async def leave(self) -> None:
        """End the application for a restart of the container, its drain being over."""
        await self._keeper.end(signal.SIGTERM, self._left_seconds())

    async def close(self) -> None:
        """End every process and task. Idempotent."""
        self._is_closed = True
        await self._actions.close()
        await self._keeper.end(signal.SIGKILL, END_SECONDS)
        tasks = [*self._tasks, *filter(None, [self._hook])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._probes.close()

    def forward(self, number: int) -> None:
        """Pass a signal on to the command."""
        self._keeper.send(number)

    def reap_orphans(self) -> None:
        """Reap what has ended and came to PID 1, at SIGCHLD; never the command."""
        reap(list_ended_children() - {self._keeper.pid})

    # --- ModelServer

    def models(self) -> list[ModelView]:
        """No models: the application's are its own."""
        return []

    def model(self, name: str) -> ModelView:
        """Raise NoSuchModelError."""
        raise NoSuchModelError(f"model {name[:63]!r}: this agent wraps a command and has no models")

    def report(self) -> Report:
        """Return the report of the last look; each call counts ``sequence`` up."""
        self._sequence += 1
        idle_since = self._watch.idle_since
        return Report(
            agent=AgentIdentity(
                version=self._surroundings.version,
                mode=self._surroundings.mode,
                boot_id=self._boot_id,
                epoch=self._keeper.epoch,
                started_at=self._started_at,
                pod=self._surroundings.pod,
            ),
            sequence=self._sequence,
            observed_at=format_time(self._watch.observed_at or self._clock.now()),
            config_generation=self._config.metadata.generation,
            devices=self._watch.devices(),
            memory=self._watch.memory(),
            models=[],
            idle=self._watch.is_idle,
            idle_since=None if idle_since is None else format_time(idle_since),
            draining=self._drain.is_on,
            action=self._actions.last,
        )

    def is_live(self) -> bool:
        """False once a task of the agent's own has ended: only a new process helps."""
        return not self._is_closed and not any(task.done() for task in self._tasks)

    def is_ready(self) -> bool:
        """Whether the application takes requests, and is to."""
        return self._watch.is_ready and not self._drain.is_on

    def admit(self) -> Never:
        """Raise NotSupportedError."""
        self._refuse("a task")

    async def submit(
        self,
        model: str,
        task: Task,
        *,
        keep_alive_seconds: float | None = None,
        is_admitted: bool = False,
        parts: Parts | None = None,
    ) -> TaskResult:
        """Raise NotSupportedError."""
        del task, keep_alive_seconds, is_admitted, parts
        self._refuse(f"a task for model {model[:63]!r}")

    async def load(self, model: str) -> ModelReport:
        """Raise NotSupportedError."""
        self._refuse(f"load of {model[:63]!r}")

    async def offload(self, model: str, tier: OffloadTier | None = None) -> ModelReport:
        """Raise NotSupportedError."""
        del tier
        self._refuse(f"offload of {model[:63]!r}")

    async def unload(self, model: str) -> ModelReport:
        """Raise NotSupportedError."""
        self._refuse(f"unload of {model[:63]!r}")

    async def scrub(self) -> Report:
        """Raise NotSupportedError."""
        self._refuse("scrub")

    async def apply_config(self, config: AgentConfig) -> Report:
        """Raise NotSupportedError."""
        del config
        self._refuse("a new config")

    async def drain(self) -> Report:
        """Tell the application to take no new requests; return when it is idle."""
        self._is_held = True
        self._begin_drain(CALL)
        if self._hook is None:
            await self._watch.wait_idle()
        await self._drain.wait(None)
        return self.report()

    def resume(self) -> Report:
        """Let it take requests again, unless an action or the end of the process is under way."""
        self._is_held = False
        self._drain.end(CALL)
        if not self._drain.is_on and self._keeper.end_drain():
            self._stop_hook()
            self._watch.note_resumed()
            if self._config.run.drain.http:
                self._hook = asyncio.create_task(self._take_back())
        return self.report()

    def recycle(self, request: RestartRequest) -> ActionReport:
        """Drain, then end the command and start it again; the same ID again changes nothing."""
        return self._begin_action(request, ActionStep.RECYCLE)

    def restart(self, request: RestartRequest) -> ActionReport:
        """Drain, then let PID 1 exit 0; the same ID again changes nothing."""
        return self._begin_action(request, ActionStep.IN_PLACE)

    # --- drain and actions

    def _begin_action(self, request: RestartRequest, step: ActionStep) -> ActionReport:
        if self._keeper.is_ending:
            raise DrainingError("the agent is about to end")
        before = self._actions.last
        action = self._actions.begin(request, step)
        if action is not before:
            self._act_by = self._clock.monotonic() + request.drain_timeout_seconds
            self._tell_to_drain()
        return action

    def _begin_drain(self, wish: str) -> None:
        self._drain.begin(wish)
        self._tell_to_drain()

    def _tell_to_drain(self) -> None:
        """Call the hook, once for each process. Without one, SIGTERM is the drain."""
        was_draining = self._keeper.is_draining
        if self._keeper.begin_drain() and not was_draining and self._config.run.drain.http:
            self._stop_hook()
            self._drain.note_requests(has_requests=True)
            self._hook = asyncio.create_task(self._call_hook())

    async def _call_hook(self) -> None:
        """1. 202: drained once idle. 2. Another 2xx: drained. 3. Else SIGTERM has to do."""
        url = self._config.run.drain.http
        try:
            status = await self._probes.begin_drain(url)
            _log.info("drain hook", url=url, status=status)
            # 1
            if status == 202:
                await self._watch.wait_idle()
            # 2, 3
            elif not 200 <= status < 300:
                _log.warning("drain hook failed; SIGTERM has to do", url=url, status=status)
        finally:
            if self._hook is asyncio.current_task():
                self._drain.note_requests(has_requests=False)

    async def _take_back(self) -> None:
        url = self._config.run.drain.http
        status = await self._probes.end_drain(url)
        if not 200 <= status < 300:
            _log.warning("drain hook not taken back; recycle helps", url=url, status=status)

    def _stop_hook(self) -> None:
        if self._hook is not None:
            self._hook.cancel()
            self._hook = None
        self._drain.note_requests(has_requests=False)

    def _cut(self) -> str:
        return f"the application (process {self._keeper.pid}) had not drained"

    async def _recycle(self) -> None:
        self._stop_hook()
        await self._keeper.renew(self._left_seconds())
        self._observe("Recycle")
        await self._keeper.wait_running(_READY_PATIENCE_SECONDS)
        await self._watch.look()

    def _left_seconds(self) -> float:
        return max(END_SECONDS, self._act_by - self._clock.monotonic())

    def _note_start(self) -> None:
        self._watch.note_start()
        if self._is_held:
            self._tell_to_drain()

    def _observe(self, reason: str) -> None:
        self._surroundings.observer.observe_worker_restart(UNKNOWN_MODEL, reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    def _refuse(self, what: str) -> Never:
        raise NotSupportedError(
            f"{what}: this agent wraps a command (vram-agent run), whose models are its own; "
            "use /recycle or /restart"
        )
