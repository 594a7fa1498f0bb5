"""The supervisor: requests come in, models move, tasks run, and one writer keeps the account.

Why it exists: it owns all mutable state of an agent that serves. Every event (a request, the end
of a transition or task, a death, a timer, a control call) changes the cells synchronously and then
*pumps*: gather the facts, let ``core.policy`` decide a step, begin it, until there is none left.
What takes long runs as a task of its own and comes back as the next event. Called by serving/
through ``ModelServer`` and composed by ``__main__``. It knows neither HTTP nor processes, and
imports neither torch nor onnxruntime nor numpy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

import structlog

from vram_agent.backend import Backend, GroupBackend, ProcessExit, Task, TaskResult
from vram_agent.core.policy import decide
from vram_agent.core.pool import CommandKind, Reason, Step, StepKind
from vram_agent.errors import (
    AgentError,
    ModelFailedError,
    NotResidentError,
    WorkerDiedError,
)
from vram_agent.parts import Parts
from vram_agent.protocol import (
    ActionReport,
    ActionStep,
    AgentConfig,
    ModelReport,
    ModelState,
    OffloadTier,
    Report,
    RestartRequest,
)
from vram_agent.serving.base import ModelView
from vram_agent.supervision.actions import CALL, STOP, Acting, Actions, Drain
from vram_agent.supervision.effects import carry_out, close_group, run_task
from vram_agent.supervision.fleet import Fleet, GroupCell, ModelCell, PendingCommand, Waiting
from vram_agent.supervision.gathering import gather_pool
from vram_agent.supervision.host import HostGauge
from vram_agent.supervision.learning import Learning
from vram_agent.supervision.ports import Surroundings
from vram_agent.supervision.reconfigure import (
    Reconfiguration,
    ensure_applicable,
    order_eager_load,
    with_own_settings,
)
from vram_agent.supervision.reporting import Reporter, model_report, model_view
from vram_agent.supervision.requests import Requests
from vram_agent.supervision.transitions import Transitions
from vram_agent.supervision.upkeep import Scrubs, end_gpu_processes, sum_scrubs

_MAX_STEPS: Final = 10_000
"""More steps than this after one event would be a policy that never rests."""
_KEEP: Final = -1.0
_log = structlog.get_logger("vram_agent.supervisor")


class Supervisor:
    """An agent that serves models; a ``ModelServer``. Make it and call it on one event loop."""

    def __init__(self, config: AgentConfig, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._clock = surroundings.clock
        self._fleet = Fleet(config, surroundings.host_limit_bytes)
        self._requests = Requests(self._fleet, surroundings)
        self._host = HostGauge(surroundings.host, surroundings.clock)
        self._transitions = Transitions(self._fleet, surroundings, self._host)
        self._reconfiguration = Reconfiguration(self._fleet, self._requests, self._transitions)
        self._reporter = Reporter(self._fleet, surroundings)
        self._learning = Learning(self._fleet, surroundings.sizes)
        self._drain = Drain()
        self._exit = asyncio.Event()
        self._actions = Actions(
            surroundings,
            self._drain,
            Acting(cut=self._requests.cut, recycle=self._recycle, leave=self._exit.set),
        )
        self._backend: Backend | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._scrubs = Scrubs(self._fleet, self._transitions, surroundings.observer)
        self._retired = asyncio.Event()
        self._is_frozen = self._is_closed = False
        self._fault: BaseException | None = None

    async def recall(self) -> None:
        """Learn from earlier boots, before ``attach``. Takes seconds at most."""
        await self._learning.recall()

    def attach(self, backend: Backend) -> None:
        """Take the devices and processes; requests that came before have waited for them."""
        self._backend = backend
        self._fleet.devices = self._reporter.attach(backend)
        self._fleet.set_limits()
        for cell in self._fleet.models.values():
            self._fleet.recall(cell)
            order_eager_load(cell)
        self._pump()

    async def wait_exit(self) -> None:
        """Return when a ``restart`` has drained and PID 1 is to exit."""
        await self._exit.wait()

    async def stop(self, grace_seconds: float) -> str:
        """Take no new requests and finish the accepted ones; return what the grace cut, if any."""
        self._drain.begin(STOP)
        self._pump()
        if await self._drain.wait_empty(grace_seconds):
            return ""
        cut = self._requests.cut()
        return cut or f"{self._drain.admitted} still received or answered"

    async def close(self) -> None:
        """End every process and task. Idempotent."""
        self._drain.begin(STOP)
        self._is_frozen = self._is_closed = True
        self._requests.cut()
        self._stop_timer()
        await self._actions.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        backends = [g.backend for g in self._fleet.groups.values() if g.backend is not None]
        await asyncio.gather(*(b.close() for b in backends), return_exceptions=True)

    def models(self) -> list[ModelView]:
        """Every model of the config, in its order."""
        return [model_view(cell) for cell in self._fleet.listed()]

    def model(self, name: str) -> ModelView:
        """One model. Raises NoSuchModelError."""
        return model_view(self._fleet.model(name))

    def report(self) -> Report:
        """Measure and return the report; each call counts ``sequence`` up."""
        return self._reporter.write(is_draining=self._drain.is_on, action=self._actions.last)

    def is_live(self) -> bool:
        """False after a fault of the supervisor's own: only a new process helps."""
        return self._fault is None and not self._is_closed

    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return not self._drain.is_on and not self._is_closed

    def admit(self) -> AbstractContextManager[None]:
        """Hold a request's place from its head to its answer. Raises DrainingError, at once."""
        return self._drain.admit()

    async def submit(
        self,
        model: str,
        task: Task,
        *,
        keep_alive_seconds: float | None = None,
        is_admitted: bool = False,
        parts: Parts | None = None,
    ) -> TaskResult:
        """Queue the task, bring the model into VRAM, run it and return its result."""
        cell = self._fleet.model(model)
        if not is_admitted or self._drain.is_over:
            self._drain.ensure_off()
        pause = self._transitions.retry_after_seconds(cell)
        if cell.residence.state is ModelState.FAILED and pause > 0:
            raise ModelFailedError(cell.error or "the model failed", retry_after_seconds=pause)
        waiting = self._requests.enqueue(cell, task, keep_alive_seconds, parts)
        self._pump()
        try:
            return await waiting.answer
        except BaseException:
            # It left its place without a task: nothing else says so to the policy.
            self._requests.give_up(cell, waiting)
            self._pump()
            raise

    async def load(self, model: str) -> ModelReport:
        """Bring a model into VRAM without a task; it then stays as after keep-alive -1."""
        self._drain.ensure_off()
        return await self._command(model, CommandKind.LOAD, OffloadTier.PINNED_HOST)

    async def offload(self, model: str, tier: OffloadTier | None = None) -> ModelReport:
        """Take a model out of VRAM once no task runs on it.

        Where another model of the group needs the GPU process, it stops at PinnedHost, and goes
        on to ``tier`` when that one needs it no more, unless it is used before.
        """
        cell = self._fleet.model(model)
        target = cell.spec.residency.offload_tier if tier is None else tier
        if target is OffloadTier.DISK:
            return await self.unload(model)
        return await self._command(model, CommandKind.OFFLOAD, target)

    async def unload(self, model: str) -> ModelReport:
        """Drop a model to the Disk tier once no task runs on it; its next request loads it."""
        return await self._command(model, CommandKind.UNLOAD, OffloadTier.DISK)

    async def scrub(self) -> Report:
        """Scrub every GPU process, each once nothing else runs in it."""
        futures = self._scrubs.want_all()
        self._pump()
        scrubs = await asyncio.gather(*map(asyncio.shield, futures))
        self._reporter.note_scrub(sum_scrubs(scrubs))
        return self.report()

    async def drain(self) -> Report:
        """Take no new requests; return when all accepted ones have been answered."""
        self._drain.begin(CALL)
        self._pump()
        await self._drain.wait(None)
        return self.report()

    def resume(self) -> Report:
        """Take requests again, unless an action or the end of the process is under way."""
        self._drain.end(CALL)
        self._pump()
        return self.report()

    async def apply_config(self, config: AgentConfig) -> Report:
        """Take a new config without a restart; return when what it changed has left memory."""
        config = with_own_settings(self._fleet.config, config)
        ensure_applicable(self._fleet.config, config)
        self._reconfiguration.begin(config)
        self._retired.clear()
        self._pump()
        await self._retired.wait()
        return self.report()

    def recycle(self, request: RestartRequest) -> ActionReport:
        """Drain, then end the GPU processes; the same ID again changes nothing."""
        return self._actions.begin(request, ActionStep.RECYCLE)

    def restart(self, request: RestartRequest) -> ActionReport:
        """Drain, then let PID 1 exit 0; the same ID again changes nothing."""
        return self._actions.begin(request, ActionStep.IN_PLACE)

    # --- the one writer

    def _pump(self) -> None:
        """Do what there is to do, and set the timer for what time alone brings."""
        try:
            self._retire()
            if self._backend is not None and not self._is_frozen:
                for due in self._scrubs.take_due():
                    self._spawn(self._then_pump(self._scrubs.carry_out(*due)))
                self._take_steps(self._backend)
        except Exception as fault:
            # Nothing may be half done: say so, and let the liveness probe end this process.
            self._fault = fault
            _log.exception("supervisor fault")
        self._drain.note_requests(has_requests=self._fleet.has_requests())
        self._reporter.note_activity(is_idle=self._fleet.is_idle())

    def _take_steps(self, backend: Backend) -> None:
        now = self._clock.monotonic()
        for _ in range(_MAX_STEPS):
            decision = decide(gather_pool(self._fleet, backend, self._host.room_bytes()), now)
            for cell in self._fleet.models.values():
                is_short = cell.name in decision.short
                since = now if cell.short_since is None else cell.short_since
                cell.short_since = since if is_short else None
                cell.waits_for = decision.waits.get(cell.name, "")
            if decision.step is None:
                self._wake_at(decision.requeue_at, now)
                return
            self._take(decision.step)
            if decision.step.kind is StepKind.RUN and not self._fleet.has_startable():
                # The last thing that is decided, and a task that begins frees nothing.
                self._wake_at(decision.requeue_at, now)
                return
        raise RuntimeError("the policy does not come to rest")

    def _take(self, step: Step) -> None:
        cell = self._fleet.models[step.model]
        match step.kind:
            case StepKind.RUN:
                self._spawn(self._run(cell, self._requests.start(cell)))
            case StepKind.REFUSE:
                self._turn_away(cell, self._transitions.refuse(step))
            case StepKind.FINISH:
                command = cell.commands.popleft()
                if command.kind is CommandKind.LOAD:
                    cell.keep_alive_seconds = _KEEP
                elif command.kind is CommandKind.OFFLOAD:
                    cell.called_tier = command.tier
                elif command.kind is CommandKind.UNLOAD:
                    self._transitions.reset(cell, Reason.CALLED)
                command.settle()
            case _:
                self._transitions.begin(step)
                self._spawn(self._move(step, cell))

    async def _run(self, cell: ModelCell, waiting: Waiting) -> None:
        outcome = await run_task(cell.name, waiting, self._open(cell.group), self._clock.monotonic)
        if isinstance(outcome.error, NotResidentError):
            self._requests.put_back(cell, waiting)
        else:
            self._requests.finish(cell, waiting, outcome)
        if isinstance(outcome.error, NotResidentError | WorkerDiedError):
            self._transitions.sync(cell.group, Reason.WORKER_DIED)
        # After those who have their answer now: what is decided next is not theirs to wait for.
        asyncio.get_running_loop().call_soon(self._pump)

    async def _move(self, step: Step, cell: ModelCell) -> None:
        group = self._open(cell.group)
        outcome = await carry_out(step, group, cell.spec, self._clock.monotonic)
        verdict = self._transitions.settle(outcome)
        self._reporter.note_scrub(outcome.scrubbed)
        if self._learning.note(cell):
            self._spawn(self._learning.save())
        if verdict is not None:
            self._turn_away(cell, verdict)
        self._pump()

    def _turn_away(self, cell: ModelCell, error: AgentError) -> None:
        """Answer everything that waits for a model which cannot come into VRAM now."""
        self._requests.refuse_all(cell, error)
        for command in list(cell.commands):
            if command.kind in (CommandKind.LOAD, CommandKind.EAGER):
                cell.commands.remove(command)
                command.settle(error)

    def _on_exit(self, group: GroupCell, exit_: ProcessExit) -> None:
        if not self._is_closed:
            self._transitions.lose(group, exit_)
            self._pump()

    def _retire(self) -> None:
        for backend in self._reconfiguration.complete():
            self._spawn(close_group(backend))
        if self._reconfiguration.is_complete():
            self._retired.set()

    async def _command(self, model: str, kind: CommandKind, tier: OffloadTier) -> ModelReport:
        cell = self._fleet.model(model)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        command = PendingCommand(kind, tier, answer)
        cell.commands.append(command)
        self._pump()
        try:
            await answer
        finally:
            if command in cell.commands:
                cell.commands.remove(command)
            self._pump()
        return model_report(cell)

    async def _recycle(self) -> None:
        self._is_frozen = True
        await end_gpu_processes(
            self._fleet, self._transitions, self._surroundings.observer, self._go_on_recycled
        )

    def _go_on_recycled(self) -> None:
        self._is_frozen = False
        self._reporter.epoch += 1
        self._pump()

    async def _then_pump(self, work: Coroutine[Any, Any, None]) -> None:
        await work
        self._pump()

    def _open(self, group: GroupCell) -> GroupBackend:
        if group.backend is None:
            assert self._backend is not None  # noqa: S101 - nothing moves before attach
            group.backend = self._backend.open_group(group.name, partial(self._on_exit, group))
        return group.backend

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._collect)

    def _collect(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fault = fault
            _log.error("supervisor fault", error=repr(fault), exc_info=fault)

    def _wake_at(self, at: float | None, now: float) -> None:
        self._stop_timer()
        if at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, at - now), self._pump)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
