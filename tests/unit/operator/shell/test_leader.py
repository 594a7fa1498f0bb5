"""The Lease in fake time: one at a time, given back on a stop, taken over when it runs out."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from vram_operator.kube import ApiError, ApiUnavailableError
from vram_operator.leader import Leader, LeaseRef, NotLeadingError

pytestmark = pytest.mark.looptime
START = datetime(2026, 1, 1, tzinfo=UTC)


class LoopClock:
    """Follows the fake time of the loop."""

    def now(self) -> datetime:
        return START + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class Server:
    """Keeps one Lease as the apiserver does; it may be dead or hang."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.is_dead = False
        self.hangs = False
        self.holders: list[str] = []

    async def find(self, path: str) -> dict[str, Any] | None:
        if self.hangs:
            await asyncio.Event().wait()
        self._answer()
        return self.lease

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        if self.lease is not None:
            raise ApiError("POST", 409, {"reason": "AlreadyExists"})
        return self._store(body)

    async def replace(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        if self.lease is None or body["metadata"]["resourceVersion"] != str(self.version):
            raise ApiError("PUT", 409, {"reason": "Conflict"})
        return self._store(body)

    def _answer(self) -> None:
        if self.is_dead:
            raise ApiUnavailableError("nobody answers")

    def _store(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        metadata = {**body["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**body, "metadata": metadata, "spec": dict(body["spec"])}
        holder = body["spec"]["holderIdentity"]
        if not self.holders or self.holders[-1] != holder:
            self.holders.append(holder)
        return self.lease


def leader(server: Server, name: str) -> Leader:
    return Leader(server, LeaseRef("ns", "lease", name), LoopClock())  # type: ignore[arg-type]


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_first_to_come_leads_and_stays() -> None:
    server = Server()
    first, second = leader(server, "a"), leader(server, "b")
    tasks = [asyncio.create_task(one.run()) for one in (first, second)]
    for _ in range(60):
        await asyncio.sleep(1)
        assert first.is_leading
        assert not second.is_leading
    with pytest.raises(NotLeadingError):
        second.ensure_leading()
    first.ensure_leading()
    assert server.holders == ["a"]
    for task in tasks:
        await stop(task)


async def test_a_clean_stop_hands_over_within_a_retry() -> None:
    server = Server()
    first, second = leader(server, "a"), leader(server, "b")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    waiting = asyncio.create_task(second.run())
    await asyncio.sleep(5)
    await stop(task)
    await first.release()
    assert not first.is_leading
    before = asyncio.get_running_loop().time()
    await second.acquired.wait()
    assert asyncio.get_running_loop().time() - before <= 3
    await stop(waiting)


async def test_a_dead_leader_is_replaced_once_its_lease_ran_out() -> None:
    server = Server()
    first, second = leader(server, "a"), leader(server, "b")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    waiting = asyncio.create_task(second.run())
    await asyncio.sleep(5)
    await stop(task)
    died = asyncio.get_running_loop().time()
    await second.acquired.wait()
    assert 11 <= asyncio.get_running_loop().time() - died <= 17
    await stop(waiting)


async def test_a_leader_that_is_cut_off_stops_before_anyone_can_follow() -> None:
    server = Server()
    first = leader(server, "a")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    server.is_dead = True
    cut_off = asyncio.get_running_loop().time()
    await first.suspended.wait()
    with pytest.raises(NotLeadingError):
        first.ensure_leading()
    assert asyncio.get_running_loop().time() - cut_off < 15
    assert not first.has_answer

    # The Lease is still its own when the apiserver is back: it leads again.
    server.is_dead = False
    await first.acquired.wait()
    first.ensure_leading()
    assert server.holders == ["a"]
    await stop(task)


async def test_what_is_under_way_is_cut_off_at_the_deadline_when_the_apiserver_hangs() -> None:
    server = Server()
    first = leader(server, "a")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    renewed = asyncio.get_running_loop().time()
    server.hangs = True
    await first.suspended.wait()
    assert asyncio.get_running_loop().time() - renewed == pytest.approx(10, abs=0.1)
    assert not first.is_leading
    await stop(task)


@pytest.mark.parametrize("offset", [0.1, 0.7, 1.3, 1.9])
async def test_a_standby_follows_at_the_moment_that_the_lease_runs_out(offset: float) -> None:
    server = Server()
    first, second = leader(server, "a"), leader(server, "b")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    await asyncio.sleep(offset)
    waiting = asyncio.create_task(second.run())
    await asyncio.sleep(7)
    await stop(task)
    await second.acquired.wait()
    assert second._seen is not None
    last_change = second._seen[1]
    assert asyncio.get_running_loop().time() == pytest.approx(last_change + 15, abs=0.01)
    await stop(waiting)


async def test_a_leader_that_was_overtaken_ends() -> None:
    server = Server()
    first = leader(server, "a")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    assert server.lease is not None
    server.lease["spec"]["holderIdentity"] = "b"
    await asyncio.wait_for(task, 10)
    assert not first.is_leading
    await first.release()
    assert server.lease["spec"]["holderIdentity"] == "b"


async def test_clocks_need_not_agree() -> None:
    server = Server()
    first, second = leader(server, "a"), leader(server, "b")
    task = asyncio.create_task(first.run())
    await first.acquired.wait()
    assert server.lease is not None
    # What the Lease says of time is another machine's; only that it changes counts.
    server.lease["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    waiting = asyncio.create_task(second.run())
    await asyncio.sleep(60)
    assert not second.is_leading
    await stop(task)
    await stop(waiting)
