"""Requests from their arrival to their answer: queues, places given up, leases.

Why it exists: whatever happens to models and processes, each accepted request gets exactly one
answer, and none waits in more than one place. Called by the supervisor on its loop. It knows no
residence and moves no model.
"""

from __future__ import annotations

import asyncio
import itertools

from vram_agent.backend import Task, TaskResult
from vram_agent.errors import (
    AgentError,
    BadInputError,
    DrainingError,
    QueueFullError,
    QueueTimeoutError,
    WorkerDiedError,
)
from vram_agent.parts import Parts
from vram_agent.supervision.effects import TaskOutcome
from vram_agent.supervision.fleet import Fleet, ModelCell, Waiting
from vram_agent.supervision.ports import Surroundings, format_time

DEFAULT_TASK_SECONDS = 1.0
_WEIGHT_OF_LAST = 0.3


class Requests:
    """The queues of all models. A request is in its model's queue, or running, or answered."""

    def __init__(self, fleet: Fleet, surroundings: Surroundings) -> None:
        self._fleet = fleet
        self._clock = surroundings.clock
        self._observer = surroundings.observer
        self._numbers = itertools.count(1)

    def enqueue(
        self,
        cell: ModelCell,
        task: Task,
        keep_alive_seconds: float | None,
        parts: Parts | None = None,
    ) -> Waiting:
        """Give a request its place. Raises QueueFullError with the time until a place is free."""
        policy = self._fleet.config.queue
        if len(cell.queue) >= policy.max_depth:
            raise QueueFullError(
                f"{len(cell.queue)} requests wait for model {cell.name}, "
                f"queue.maxDepth is {policy.max_depth}; try again later",
                retry_after_seconds=self.retry_after_seconds(cell),
            )
        loop = asyncio.get_running_loop()
        waiting = Waiting(
            number=next(self._numbers),
            task=task,
            answer=loop.create_future(),
            arrived_at=self._clock.monotonic(),
            keep_alive_seconds=keep_alive_seconds,
            parts=parts,
        )
        waiting.timer = loop.call_later(policy.timeout_seconds, self._expire, cell, waiting)
        cell.queue[waiting.number] = waiting
        return waiting

    def retry_after_seconds(self, cell: ModelCell) -> float:
        """When a place in a full queue is likely: one task's mean time, at least a second."""
        return max(1.0, cell.task_seconds or DEFAULT_TASK_SECONDS)

    def give_up(self, cell: ModelCell, waiting: Waiting) -> None:
        """The caller has gone: free the place, or drop the answer of the task that runs.

        A task that gives parts ends at its next one.
        """
        self._leave(cell, waiting)
        if not waiting.answer.done():
            waiting.answer.cancel()
        if waiting.parts is not None and waiting.answer.cancelled():
            waiting.parts.abandon()

    def start(self, cell: ModelCell) -> Waiting:
        """Take the first request out of the queue and lease the model to it."""
        _, waiting = cell.queue.popitem(last=False)
        self._stop_timer(waiting)
        cell.running = waiting
        cell.group.running = cell
        cell.last_run = next(self._numbers)
        self._observer.observe_queue_wait(cell.name, self._clock.monotonic() - waiting.arrived_at)
        return waiting

    def finish(self, cell: ModelCell, waiting: Waiting, outcome: TaskOutcome) -> None:
        """Give the lease back and answer."""
        cell.running = None
        cell.group.running = None
        cell.last_used_at = self._clock.monotonic()
        cell.last_used_wall = format_time(self._clock.now())
        cell.keep_alive_seconds = waiting.keep_alive_seconds
        if outcome.error is None:
            cell.starvations = 0
            mean = outcome.seconds if cell.task_seconds is None else cell.task_seconds
            cell.task_seconds = mean + _WEIGHT_OF_LAST * (outcome.seconds - mean)
        self._answer(waiting, outcome.result, outcome.error)

    def put_back(self, cell: ModelCell, waiting: Waiting) -> None:
        """Give a task that never began its place at the head of the queue again."""
        cell.running = None
        cell.group.running = None
        if waiting.answer.done():
            return
        cell.queue[waiting.number] = waiting
        cell.queue.move_to_end(waiting.number, last=False)
        policy = self._fleet.config.queue
        left = waiting.arrived_at + policy.timeout_seconds - self._clock.monotonic()
        loop = asyncio.get_running_loop()
        waiting.timer = loop.call_later(max(0.0, left), self._expire, cell, waiting)

    def refuse_all(self, cell: ModelCell, error: AgentError) -> int:
        """Answer every waiting request with the error; return how many there were."""
        waiting = list(cell.queue.values())
        for request in waiting:
            self._leave(cell, request)
            self._answer(request, None, error)
        return len(waiting)

    def cut(self) -> str:
        """Answer whatever is still open; say what that was, empty for nothing.

        The leases of what runs end when its tasks do.
        """
        late = DrainingError("the agent's time to drain is over", retry_after_seconds=1.0)
        cuts: list[str] = []
        for cell in self._fleet.models.values():
            words: list[str] = []
            if cell.running is not None:
                words.append(f"1 {cell.running.task.kind.value} running")
                error = WorkerDiedError("the task outlasted the agent's time to drain")
                self._answer(cell.running, None, error)
            if queued := self.refuse_all(cell, late):
                words.append(f"{queued} queued")
            if words:
                cuts.append(f"{cell.name}: {', '.join(words)}")
        return "; ".join(cuts)

    def _expire(self, cell: ModelCell, waiting: Waiting) -> None:
        self._leave(cell, waiting)
        seconds = self._fleet.config.queue.timeout_seconds
        ahead = len(cell.queue)  # who comes again waits behind them
        error = QueueTimeoutError(
            f"the request waited longer than queue.timeoutSeconds ({seconds}) "
            f"for model {cell.name} ({cell.residence})"
            + (f"; {cell.waits_for}" if cell.waits_for else ""),
            retry_after_seconds=min(seconds, (1 + ahead) * self.retry_after_seconds(cell)),
        )
        self._answer(waiting, None, error)

    def _leave(self, cell: ModelCell, waiting: Waiting) -> None:
        self._stop_timer(waiting)
        cell.queue.pop(waiting.number, None)

    def _stop_timer(self, waiting: Waiting) -> None:
        if waiting.timer is not None:
            waiting.timer.cancel()
            waiting.timer = None

    def _answer(
        self, waiting: Waiting, result: TaskResult | None, error: AgentError | None
    ) -> None:
        if waiting.answer.done():
            return
        if error is not None:
            # Each waiter gets an exception of its own: a shared one would grow by a traceback each.
            copy = type(error)(error.message)
            copy.retry_after_seconds = error.retry_after_seconds
            if isinstance(error, BadInputError) and isinstance(copy, BadInputError):
                copy.param = error.param
            copy.__cause__ = error.__cause__
            waiting.answer.set_exception(copy)
        elif result is not None:
            waiting.answer.set_result(result)
