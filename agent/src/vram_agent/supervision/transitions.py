"""How a transition begins and ends in the supervisor's state: lifecycle, ledgers, log, metrics.

Why it exists: a transition is a transaction. ``begin`` reserves and marks, ``settle`` commits what
was measured or rolls back; between them only the group's ``is_moving`` says that the processes are
at work. Called by the supervisor on its loop. It awaits nothing and decides nothing.
"""

from __future__ import annotations

import signal
from typing import Final

import structlog

from vram_agent.backend import ProcessExit, Scrubbed
from vram_agent.core.ledger import HOST
from vram_agent.core.lifecycle import Event, Residence, decide_residence
from vram_agent.core.pool import Reason, Step, StepKind
from vram_agent.errors import AgentError, ModelFailedError, NoVramError, WorkerDiedError
from vram_agent.protocol import ModelState, Tier, Transition
from vram_agent.supervision.effects import Outcome
from vram_agent.supervision.fleet import Fleet, GroupCell, ModelCell
from vram_agent.supervision.gathering import declared_bytes
from vram_agent.supervision.host import HostGauge
from vram_agent.supervision.ports import Surroundings, format_time

MAX_RESTORE_DEATHS: Final = 3
"""After so many processes that died while the model came into VRAM, the model is Failed."""

_IN_GPU_PROCESS: Final = frozenset({Tier.VRAM, Tier.PINNED_HOST})
_AT_REST: Final = frozenset({ModelState.RESIDENT, ModelState.OFFLOADED, ModelState.FAILED})
_log = structlog.get_logger("vram_agent.transition")


class Transitions:
    """Begins and settles transitions; the only writer of residences and ledgers."""

    def __init__(self, fleet: Fleet, surroundings: Surroundings, host: HostGauge) -> None:
        self._fleet = fleet
        self._host = host
        self._clock = surroundings.clock
        self._observer = surroundings.observer
        self._origins: dict[str, Residence] = {}

    def begin(self, step: Step) -> None:
        """Reserve and mark. Raises, and changes nothing, where the step is not legal now."""
        cell = self._fleet.models[step.model]
        group = cell.group
        match step.kind:
            case StepKind.LOAD:
                after = decide_residence(cell.residence, Event.LOAD)
                self._fleet.host = self._fleet.host.reserve(cell.name, HOST, step.needed_bytes)
                self._mark(cell, after)
            case StepKind.RESTORE:
                after = decide_residence(cell.residence, Event.RESTORE)
                self._fleet.vram = self._fleet.vram.reserve(
                    cell.name, step.device, step.needed_bytes
                )
                cell.short_since = None
                group.device = step.device
                self._mark(cell, after)
            case _:
                self._begin_leaving(step, cell)
        group.is_moving = True

    def settle(self, outcome: Outcome) -> AgentError | None:
        """Commit or roll back. Returns what the model's waiting requests must be told, if so."""
        step = outcome.step
        cell = self._fleet.models[step.model]
        cell.group.is_moving = False
        self._host.forget()
        verdict: AgentError | None = None
        match step.kind:
            case StepKind.LOAD:
                verdict = self._settle_load(cell, outcome)
            case StepKind.RESTORE:
                verdict = self._settle_restore(cell, outcome)
            case _:
                self._settle_leaving(cell, outcome)
        self.sync(cell.group, Reason.WORKER_DIED)
        return verdict

    def refuse(self, step: Step) -> AgentError:
        """Return what the waiting requests are told; Failed where no waiting helps."""
        cell = self._fleet.models[step.model]
        cell.short_since = None
        cell.out_of_vram_on.clear()
        if not step.is_permanent:
            return NoVramError(step.message, retry_after_seconds=5.0)
        cell.note_failure(step.message, self._clock.monotonic())
        if cell.residence.state is not ModelState.FAILED:
            self._commit(cell, Event.REFUSED, (step.reason, "refuse", 0.0))
        return NoVramError(step.message, retry_after_seconds=self.retry_after_seconds(cell))

    def retry_after_seconds(self, cell: ModelCell) -> float:
        """How long a failed model is left alone still."""
        return max(0.0, cell.retry_at - self._clock.monotonic())

    def lose(self, group: GroupCell, exit_: ProcessExit) -> None:
        """Take note that a process of the group ended unasked. Idempotent; late news is ignored.

        While the group moves, the transition's own outcome says what became of its model.
        """
        backend = group.backend
        if backend is None:
            return
        is_template = exit_.role == "template"
        is_starved = exit_.signal == signal.SIGKILL and self._host.is_starved()
        if is_template:
            group.is_orphaned = backend.template_pid in (None, exit_.pid)
            group.is_starved = group.is_orphaned and is_starved
        group.death = self._explain_death(exit_, is_starved=is_starved)
        reason = f"{exit_.role.title()}{'OutOfMemory' if is_starved else 'Died'}"
        for cell in self._fleet.members(group):
            if is_template or cell.residence.tier in _IN_GPU_PROCESS:
                self._observer.observe_worker_restart(cell.name, reason)
        _log.warning(
            "process died",
            group=group.name,
            role=exit_.role,
            pid=exit_.pid,
            exit_code=exit_.exit_code,
            signal=exit_.signal,
            out_of_memory=is_starved,
        )
        if not group.is_moving:
            self.sync(group, Reason.WORKER_DIED, dead_pid=exit_.pid)

    def sync(self, group: GroupCell, reason: Reason, dead_pid: int | None = None) -> None:
        """Bring the cells of a group that does not move in line with the processes that live."""
        backend = group.backend
        if backend is None:
            return
        kind = "lose" if reason is Reason.WORKER_DIED else "offload"
        gpu_pid = None if backend.gpu_pid == dead_pid else backend.gpu_pid
        for cell in self._fleet.members(group):
            if cell.residence.state not in _AT_REST:
                continue
            is_lost = gpu_pid is None or (
                cell.residence.state is ModelState.RESIDENT and not backend.is_resident(cell.name)
            )
            if is_lost and cell.residence.tier in _IN_GPU_PROCESS:
                event = Event.ALL_LOST if cell.loads_on_device else Event.GPU_LOST
                self._commit(cell, event, (reason, kind, 0.0), group.death)
            if group.is_orphaned and gpu_pid is None and cell.residence.tier is not Tier.DISK:
                self._lose_all(cell, (reason, kind, 0.0))
        if gpu_pid is None:
            group.is_orphaned = group.is_starved = False
        if not group.is_orphaned:
            group.death = ""
        if gpu_pid is None and not group.is_moving:
            group.device = ""

    def reset(self, cell: ModelCell, reason: Reason) -> None:
        """Give a failed model a new chance."""
        cell.note_success()
        if cell.residence == Residence(ModelState.FAILED, Tier.DISK):
            self._commit(cell, Event.RESET, (reason, "reset", 0.0))

    def _lose_all(self, cell: ModelCell, note: tuple[Reason, str, float]) -> None:
        """The template is gone. Killed for want of memory, it is not made anew for a while."""
        death = cell.group.death
        if cell.group.is_starved:
            cell.note_starvation(death, self._clock.monotonic())
            self._commit(cell, Event.STARVED, note, ModelFailedError(death))
        else:
            self._commit(cell, Event.ALL_LOST, note, death)

    def _explain_death(self, exit_: ProcessExit, *, is_starved: bool) -> str:
        name = "template" if exit_.role == "template" else "GPU process"
        if is_starved:
            return (
                f"its {name} was killed by the kernel: the container is out of memory (limit "
                f"{self._host.limit_bytes} bytes); give it more, or lower hostMemory.budget"
            )
        how = f"by signal {exit_.signal}" if exit_.signal else f"with exit code {exit_.exit_code}"
        return f"its {name} ended {how}"

    def _begin_leaving(self, step: Step, cell: ModelCell) -> None:
        leaving = [
            member
            for member in self._fleet.members(cell.group)
            if member.residence.state is not ModelState.FAILED
            and (
                member is cell
                if step.kind is StepKind.OFFLOAD
                else member.residence.tier in _IN_GPU_PROCESS
                or (member is cell and step.kind is StepKind.UNLOAD)
            )
        ]
        marks = [(m, decide_residence(m.residence, Event.OFFLOAD)) for m in leaving]
        for member, after in marks:
            self._mark(member, after)
        if step.beneficiary:
            self._fleet.models[step.beneficiary].out_of_vram_on.clear()
            for member, _ in marks:
                self._observer.observe_eviction(member.name, step.reason)

    def _settle_load(self, cell: ModelCell, outcome: Outcome) -> AgentError | None:
        note = (outcome.step.reason, "load", outcome.seconds)
        if outcome.loaded is not None:
            cell.loaded = outcome.loaded
            self._fleet.host = self._fleet.host.commit(cell.name, outcome.loaded.weight_bytes, 0)
            cell.last_used_at = self._clock.monotonic()
            self._commit(cell, Event.LOADED, note, outcome.loaded.message)
            return None
        error = outcome.error or ModelFailedError(f"model {cell.name} did not load")
        if isinstance(error, WorkerDiedError) and self._is_worth_another_try(cell):
            self._commit(cell, Event.ALL_LOST, note, error)
            return None
        return self._fail(cell, Event.LOAD_FAILED, note, error)

    def _settle_restore(self, cell: ModelCell, outcome: Outcome) -> AgentError | None:
        """1. Restored. 2. Out of VRAM: as before, and the policy frees more. 3. The process died:
        again, a few times. 4. Anything else is the model's fault: Failed.
        """
        note = (outcome.step.reason, "restore", outcome.seconds)
        # 1
        if outcome.moved is not None:
            now = self._clock.monotonic()
            cell.vram_bytes = outcome.moved.vram_bytes
            self._fleet.vram = self._fleet.vram.commit(
                cell.name, outcome.moved.vram_bytes, declared_bytes(cell)
            )
            cell.restore_seconds = outcome.seconds
            cell.resident_since = cell.last_used_at = now
            cell.called_tier = None
            cell.note_success()
            self._commit(cell, Event.RESTORED, note, outcome.moved.message)
            return None
        error = outcome.error or ModelFailedError(f"model {cell.name} was not restored")
        self._release(cell)
        # 2
        if isinstance(error, NoVramError):
            cell.out_of_vram_on.add(outcome.step.device)
            self._commit(cell, Event.ROLLED_BACK, note, error)
            return None
        # 3
        if isinstance(error, WorkerDiedError) and self._is_worth_another_try(cell):
            event = Event.ALL_LOST if cell.loads_on_device else Event.GPU_LOST
            self._commit(cell, event, note, error)
            return None
        # 4
        return self._fail(cell, Event.RESTORE_FAILED, note, error)

    def _settle_leaving(self, cell: ModelCell, outcome: Outcome) -> None:
        step = outcome.step
        backend = cell.group.backend
        has_gpu_process = backend is not None and backend.gpu_pid is not None
        kind = "unload" if step.kind is StepKind.UNLOAD else "offload"
        for member in self._fleet.members(cell.group):
            is_gone = (
                outcome.has_lost_all
                or (member is cell and step.kind is StepKind.UNLOAD)
                # Without a template nothing outlives the process, also where an offload ended it.
                or (member.loads_on_device and not has_gpu_process)
            )
            note = (step.reason, kind if member is cell else "offload", outcome.seconds)
            if member.residence.state is ModelState.OFFLOADING:
                event = Event.OFFLOADED_HOST
                if is_gone:
                    event = Event.UNLOADED
                elif step.kind is StepKind.OFFLOAD and has_gpu_process and outcome.error is None:
                    event = Event.OFFLOADED_PINNED
                said = outcome.error or (outcome.moved.message if outcome.moved else None)
                self._commit(member, event, note, said, outcome.scrubbed)
            elif is_gone and member.residence.tier is not Tier.DISK:
                self._commit(member, Event.ALL_LOST, note, outcome.error)
        if outcome.has_lost_all:
            cell.group.backend = None
            cell.group.device = ""

    def _is_worth_another_try(self, cell: ModelCell) -> bool:
        cell.restore_deaths += 1
        return cell.restore_deaths < MAX_RESTORE_DEATHS

    def _fail(
        self, cell: ModelCell, event: Event, note: tuple[Reason, str, float], error: AgentError
    ) -> AgentError:
        cell.restore_deaths = 0
        cell.note_failure(error.message, self._clock.monotonic())
        self._commit(cell, event, note, error)
        return ModelFailedError(error.message, retry_after_seconds=self.retry_after_seconds(cell))

    def _mark(self, cell: ModelCell, after: Residence) -> None:
        self._origins[cell.name] = cell.residence
        cell.residence = after

    def _release(self, cell: ModelCell) -> None:
        cell.vram_bytes = 0
        self._fleet.vram = self._fleet.vram.release(cell.name)

    def _commit(
        self,
        cell: ModelCell,
        event: Event,
        note: tuple[Reason, str, float],
        said: AgentError | str | None = None,
        scrubbed: Scrubbed | None = None,
    ) -> None:
        """End a change: residence, charges, report, metric and one line of log.

        ``said``: the error it ended with, or what was unusual about it.
        """
        reason, kind, seconds = note
        message = said.message if isinstance(said, AgentError) else said or ""
        moved_bytes = cell.vram_bytes or (0 if cell.loaded is None else cell.loaded.weight_bytes)
        before = self._origins.pop(cell.name, cell.residence)
        cell.residence = decide_residence(cell.residence, event)
        if cell.residence.tier is not Tier.VRAM:
            self._release(cell)
        if cell.residence.tier is Tier.DISK:
            self._fleet.host = self._fleet.host.release(cell.name)
        cell.last_transition = Transition(
            kind=kind,
            seconds=round(seconds, 6),
            at=format_time(self._clock.now()),
            message=message,
        )
        is_failure = isinstance(said, AgentError)
        outcome = "failed" if is_failure else "ok"
        self._observer.observe_transition(cell.name, kind, seconds, outcome)
        fields: dict[str, str | int] = {"message": message} if message else {}
        if scrubbed is not None:
            self._observer.observe_scrub(scrubbed.reclaimed_bytes)
            fields |= {
                "scrub_before_bytes": scrubbed.before_bytes,
                "scrub_after_bytes": scrubbed.after_bytes,
            }
        (_log.warning if is_failure else _log.info)(
            "transition",
            model=cell.name,
            **{"from": str(before), "to": str(cell.residence)},
            reason=reason.value,
            bytes=moved_bytes,
            seconds=round(seconds, 3),
            **fields,
        )
