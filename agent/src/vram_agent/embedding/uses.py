"""Who uses a model now, and who waits for it: many uses, one lease.

Why it exists: the supervisor runs one task at a time on a model, and a use by application code is
such a task: it begins when the model is resident and ends when the last user has left. Whoever
comes meanwhile joins it, unless that would keep the memory from another model. Lives on the
Manager's loop. It moves no model and keeps no queue of its own: a use that cannot join waits in the
supervisor's, whose depth, order and timeout hold for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from vram_agent.backend import Task, TaskKind, TaskResult
from vram_agent.errors import QueueTimeoutError

TICKET = "ticket"
"""The parameter of a use's task that holds its ticket."""


@dataclass(slots=True, eq=False)
class Lease:
    """A model that is in use: the object, and the tickets of those who use it."""

    model: str
    value: object
    tickets: set[Ticket] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class Ticket:
    """One use from its call to its end. ``holder`` is the thread or asyncio task that asks."""

    model: str
    holder: object
    started: asyncio.Future[Lease] | None = None
    request: asyncio.Task[None] | None = None
    lease: Lease | None = None
    is_left: bool = False


Submit = Callable[[str, Task], Awaitable[TaskResult]]
"""Queues a task of a model and returns when it has ended."""


class Uses:
    """All uses. ``may_join`` tells whether a new one may share a model's lease now."""

    def __init__(self, submit: Submit, may_join: Callable[[str], bool]) -> None:
        self._submit = submit
        self._may_join = may_join
        self._leases: dict[str, Lease] = {}
        self._waiting: list[Ticket] = []

    async def enter(self, ticket: Ticket) -> object:
        """Return the model's object once it is resident; it stays until ``leave``.

        1. The holder has the model already: at once.
        2. It is in use and may be shared: at once.
        3. Else when the supervisor comes to it, or when 2. becomes true. Raises AgentError.
        """
        if ticket.is_left:
            return None
        lease = self._leases.get(ticket.model)
        if lease is not None:
            is_held = any(one.holder is ticket.holder for one in lease.tickets)
            # 1, 2
            if is_held or self._may_join(ticket.model):
                self._admit(lease, ticket)
                return lease.value
        # 3
        ticket.started = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        ticket.request = asyncio.create_task(self._request(ticket))
        return (await ticket.started).value

    def leave(self, ticket: Ticket) -> None:
        """End a use, or give up its place. Idempotent, and right at any time after its making."""
        if ticket.is_left:
            return
        ticket.is_left = True
        lease = ticket.lease
        if lease is not None:
            lease.tickets.discard(ticket)
            if not lease.tickets:
                # Now, and not when the task has ended: nobody may join it any more.
                del self._leases[lease.model]
                lease.ended.set()
            return
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket.request is not None and ticket.started is not None:
            ticket.request.cancel()
            ticket.started.cancel()

    async def hold(self, model: str, value: object, task: Task) -> None:
        """Be the task of a use: hand the object over, return when nobody uses it any more."""
        ticket: Ticket = task.parameters[TICKET]
        if ticket.is_left or ticket.lease is not None:
            return
        lease = self._leases[model] = Lease(model, value)
        self._admit(lease, ticket)
        self.settle()
        await lease.ended.wait()

    def settle(self) -> None:
        """Let those join who wait for a model that may be shared by now."""
        for ticket in list(self._waiting):
            lease = self._leases.get(ticket.model)
            if lease is not None and self._may_join(ticket.model):
                self._admit(lease, ticket)
                if ticket.request is not None:
                    ticket.request.cancel()

    def count(self, model: str) -> int:
        """How many uses a model has now."""
        lease = self._leases.get(model)
        return 0 if lease is None else len(lease.tickets)

    def held_by(self, holder: object) -> list[str]:
        """Which models a thread or task uses now."""
        return sorted(
            lease.model
            for lease in self._leases.values()
            if any(ticket.holder is holder for ticket in lease.tickets)
        )

    def _admit(self, lease: Lease, ticket: Ticket) -> None:
        lease.tickets.add(ticket)
        ticket.lease = lease
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket.started is not None and not ticket.started.done():
            ticket.started.set_result(lease)

    async def _request(self, ticket: Ticket) -> None:
        parameters: dict[str, Any] = {TICKET: ticket}
        try:
            await self._submit(ticket.model, Task(kind=TaskKind.INFER, parameters=parameters))
        except Exception as error:
            # Past its start the use goes on: the caller has the object, whatever was cut.
            if ticket.started is not None and not ticket.started.done():
                ticket.started.set_exception(self._explain(error, ticket))
        finally:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self.settle()

    def _explain(self, error: Exception, ticket: Ticket) -> Exception:
        held = ", ".join(self.held_by(ticket.holder))
        if not held or not isinstance(error, QueueTimeoutError):
            return error
        return QueueTimeoutError(
            f"{error.message}; its caller uses {held} meanwhile, which cannot make room: leave "
            f"that first, or raise the budget so that both fit",
            retry_after_seconds=error.retry_after_seconds,
        )
