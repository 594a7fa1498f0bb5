"""Elects the one replica that acts, with a Lease in the operator's own namespace.

The rules are those of client-go: a Lease belongs to its holder until it was not renewed for its
duration, as measured by the observer's own clock from the last change it saw, so that clocks need
not agree. The holder stops acting when it could not renew for RENEW_DEADLINE_SECONDS, which is
before anyone else may take over. Unlike in client-go a stop gives the Lease back at once.

Called by `__main__`, which ends the process when the Lease is lost. Knows nothing of workloads.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from math import inf

import structlog

from vram_operator.clock import Clock, format_micro_time
from vram_operator.kube import LEASES, Api, ApiError, ApiUnavailableError, Object
from vram_operator.queue import RetryError

LEASE_DURATION_SECONDS = 15
RENEW_DEADLINE_SECONDS = 10.0
RETRY_SECONDS = 2.0
RELEASE_TIMEOUT_SECONDS = 3.0

_log = structlog.get_logger(__name__)


class NotLeadingError(RetryError):
    """Nothing may be changed by this replica: another one may be acting."""


@dataclass(frozen=True)
class LeaseRef:
    """Which Lease, and under what name this replica holds it."""

    namespace: str
    name: str
    identity: str


class Leader:
    """Acquires, renews and releases one Lease. One `run` at a time.

    ``acquired`` is set while this replica leads. ``suspended`` is set instead when nobody answered
    for so long that it may not act any more: the Lease may still be its own when somebody does.
    `run` returns when another replica has the Lease.
    """

    def __init__(self, api: Api, lease: LeaseRef, clock: Clock) -> None:
        self._api = api
        self._lease = lease
        self._clock = clock
        self._renewed_at: float | None = None
        self._seen: tuple[str, float] | None = None
        self._free_at: float | None = None
        self.acquired = asyncio.Event()
        self.suspended = asyncio.Event()
        self.has_answer: bool | None = None
        """Was the last look at the Lease answered? None before the first."""
        self._is_overtaken = False

    @property
    def is_leading(self) -> bool:
        """May this replica act at this very moment?"""
        return (
            self._renewed_at is not None
            and self._clock.monotonic() - self._renewed_at < RENEW_DEADLINE_SECONDS
        )

    def ensure_leading(self) -> None:
        """Raise NotLeadingError unless this replica may act now."""
        if not self.is_leading:
            raise NotLeadingError("this replica does not hold the Lease; nothing was changed")

    async def run(self) -> None:
        """Wait for the Lease, then hold it.

        1. Not ours yet: look again. 2. Ours: renew it. 3. Nobody answered for too long: stop acting
        and go on trying. 4. It was ours and is another's: end.
        """
        while True:
            held = await self._attempt()
            if held and not self.acquired.is_set():  # 2
                _log.info("leading", lease=self._lease.name, identity=self._lease.identity)
                self.suspended.clear()
                self.acquired.set()
            elif self.acquired.is_set() and not self.is_leading:
                self.acquired.clear()
                self.suspended.set()
                _log.error("not leading any more", lease=self._lease.name)
            if self._is_overtaken:  # 4
                return
            await asyncio.sleep(self._pause_seconds())

    def _pause_seconds(self) -> float:
        """Return when to look again: sooner where our deadline or the other's end comes first.

        So that what is under way here is cut off at the deadline and not a retry later, and that a
        standby does not sleep beyond the moment at which it may take over.
        """
        untils = [RETRY_SECONDS, self._seconds_left()]
        if self._free_at is not None:
            untils.append(self._free_at - self._clock.monotonic())
        return min(seconds for seconds in untils if seconds > 0)

    def _seconds_left(self) -> float:
        """Return for how long this replica may still act; endless where there is nothing to end."""
        if self._renewed_at is None:
            return inf
        left = self._renewed_at + RENEW_DEADLINE_SECONDS - self._clock.monotonic()
        return left if left > 0 else inf

    async def release(self) -> None:
        """Give the Lease back, so that a standby need not wait for it to run out. May fail."""
        if self._renewed_at is None:
            return
        self._renewed_at = None
        path = LEASES.path(self._lease.namespace, self._lease.name)
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_SECONDS):
                current = await self._api.find(path)
                if current is None or _holder(current) != self._lease.identity:
                    return
                current["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._api.replace(path, current)
        except (ApiError, ApiUnavailableError, TimeoutError) as error:
            _log.warning("lease not released; it runs out by itself", error=str(error))
        else:
            _log.info("lease released", lease=self._lease.name)

    async def _attempt(self) -> bool:
        """Take or renew the Lease. Returns whether it is ours now."""
        started = self._clock.monotonic()
        try:
            async with asyncio.timeout(min(RENEW_DEADLINE_SECONDS / 2, self._seconds_left())):
                held = await self._take_or_renew(started)
        except (ApiError, ApiUnavailableError, TimeoutError) as error:
            # A conflict means that someone else was faster, anything else that nobody knows.
            self._note_answer(error)
            return False
        self._note_answer(None)
        if held:
            # Counted from before the request, as the server may have stored it as early as that.
            self._renewed_at = started
        elif self._renewed_at is not None:
            self._renewed_at, self._is_overtaken = None, True
        return held

    def _note_answer(self, error: Exception | None) -> None:
        answered = error is None or isinstance(error, ApiError)
        if self.has_answer is not False and not answered:
            _log.warning("the apiserver does not answer; trying until it does", error=str(error))
        elif self.has_answer is False and answered:
            _log.info("the apiserver answers again")
        self.has_answer = answered

    async def _take_or_renew(self, started: float) -> bool:
        """Write the Lease if it is ours or free.

        1. There is none: create it.
        2. It is ours: renew it.
        3. It is free or ran out: take it over.
        4. It is another's: leave it.
        """
        path = LEASES.path(self._lease.namespace, self._lease.name)
        current = await self._api.find(path)
        if current is None:  # 1
            fresh: Object = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._lease.name, "namespace": self._lease.namespace},
                "spec": self._spec(0, None),
            }
            await self._api.create(LEASES.path(self._lease.namespace), fresh)
            return True
        spec = current.get("spec") or {}
        transitions = int(spec.get("leaseTransitions") or 0)
        if _holder(current) == self._lease.identity:  # 2
            wanted = self._spec(transitions, spec.get("acquireTime"))
        elif self._is_free(current, started):  # 3
            wanted = self._spec(transitions + 1, None)
        else:  # 4
            return False
        await self._api.replace(path, {**current, "spec": wanted})
        return True

    def _is_free(self, current: Object, now: float) -> bool:
        spec = current.get("spec") or {}
        self._free_at = None
        if not spec.get("holderIdentity"):
            return True
        version = str(current["metadata"]["resourceVersion"])
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, now)
        duration = float(spec.get("leaseDurationSeconds") or LEASE_DURATION_SECONDS)
        self._free_at = self._seen[1] + duration
        return now >= self._free_at

    def _spec(self, transitions: int, acquired: str | None) -> Object:
        now = format_micro_time(self._clock.now())
        return {
            "holderIdentity": self._lease.identity,
            "leaseDurationSeconds": LEASE_DURATION_SECONDS,
            "acquireTime": acquired or now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }


def _holder(lease: Object) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")
