"""SIGTERM under two hundred requests at once, again and again: how many are lost.

A request counts as accepted when it was sent, wholly or in part, before the signal; each of these
must get its 200. Most clients ask over and over on connections that are kept alive, with JSON and
with binary tensors; some are in the middle of sending, some let a large answer wait in its
connection. After the signal each goes on asking, on new connections too, as clients do that still
find the pod behind its Service: those requests must get their 200, or 503 with ``Retry-After`` on a
connection that says that it closes. Called by ``python -m bench drain`` and, for one run, by
tests/integration/agent/test_load.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from bench.overhead import Model, as_served, make_tiny
from bench.record import Record, write
from bench.served import Connection, Served, serve

RUNS = 20
CLIENTS = 190
SENDING = 5
WAITING = 5
"""With an answer that they do not take yet: in all 200."""
LARGE_ROWS = 1 << 17
"""8 MiB each way: far more than a connection's buffers hold."""
GRACE_SECONDS = 60
POD = {"POD_NAME": "drained-0", "POD_NAMESPACE": "default"}
"""In a pod the agent answers for a moment longer, since requests are routed to it still."""
_REFUSED = "refused as documented"


@dataclass(kw_only=True)
class Drained:
    """What became of the requests of one run, and how the agent ended."""

    accepted: Counter[str] = field(default_factory=Counter)
    """Of requests that began before the signal: 200, another status, or lost."""
    later: Counter[str] = field(default_factory=Counter)
    """Of those that began after it: 200, refused as documented, another status, or lost."""
    exit_seconds: float = 0.0
    exit_status: int | None = None

    @property
    def lost(self) -> int:
        """Accepted requests without their 200."""
        return self.accepted.total() - self.accepted["200"]


class Crowd:
    """The clients of one run."""

    def __init__(self, served: Served, model: Model, drained: Drained) -> None:
        self._served = served
        self._drained = drained
        self._forms = (model.as_json(), model.as_binary())
        large = np.ones((LARGE_ROWS, model.array.shape[1]), np.float32)
        self._large = Model(
            name=model.name, path=model.path, input=model.input, array=large
        ).as_binary()
        self._signalled = asyncio.Event()
        self._answered = 0
        self._warm = asyncio.Event()

    async def run(self) -> None:
        """Ask, end the agent in the middle of it, and see every client out."""
        async with asyncio.TaskGroup() as clients:
            for number in range(CLIENTS):
                clients.create_task(self._ask_on(self._forms[number % len(self._forms)]))
            for _ in range(SENDING):
                clients.create_task(self._be_in_the_middle_of_sending())
            for _ in range(WAITING):
                clients.create_task(self._let_an_answer_wait())
            await self._warm.wait()
            os.kill(self._served.pid, signal.SIGTERM)
            self._signalled.set()

    async def _ask_on(self, request: bytes) -> None:
        """Ask on one connection, then on the next, until the agent refuses."""
        connection = await Connection.open(self._served.serving)
        while True:
            is_later = self._signalled.is_set()
            try:
                if connection.is_closing:
                    await connection.close()
                    connection = await Connection.open(self._served.serving)
                word = _describe(await connection.ask(request), connection)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                word = f"lost: {type(error).__name__}"
            self._count(word, is_later=is_later)
            if word != "200":
                await connection.close()
                return

    async def _be_in_the_middle_of_sending(self) -> None:
        connection = await Connection.open(self._served.serving)
        half = len(self._large) // 2
        await connection.send(self._large[:half])
        await self._signalled.wait()
        await asyncio.sleep(0.2)  # the agent has drained all else by then, or is about to
        await self._finish(connection, self._large[half:])

    async def _let_an_answer_wait(self) -> None:
        connection = await Connection.open(self._served.serving)
        await connection.send(self._large)
        await self._signalled.wait()
        await asyncio.sleep(0.2)
        await self._finish(connection, b"")

    async def _finish(self, connection: Connection, rest: bytes) -> None:
        try:
            word = _describe(await connection.ask(rest), connection)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            word = f"lost: {type(error).__name__}"
        self._count(word, is_later=False)
        await connection.close()

    def _count(self, word: str, *, is_later: bool) -> None:
        (self._drained.later if is_later else self._drained.accepted)[word] += 1
        self._answered += 1
        if self._answered >= 2 * CLIENTS:
            self._warm.set()


def _describe(answer: tuple[int, bytes], connection: Connection) -> str:
    status, _ = answer
    is_polite = connection.is_closing and b"\r\nretry-after:" in connection.head
    return _REFUSED if status == 503 and is_polite else str(status)


def drain(folder: Path) -> Drained:
    """Make one run."""
    drained = Drained()
    model = make_tiny(folder)
    before = {name: os.environ.get(name) for name in POD}
    os.environ.update(POD)
    try:
        with serve(folder, [as_served(model)], drain={"graceSeconds": GRACE_SECONDS}) as served:
            asyncio.run(_warm_up(served, model))
            asyncio.run(Crowd(served, model, drained).run())
            began = time.monotonic()
            drained.exit_status = psutil.Process(served.pid).wait(GRACE_SECONDS)
            drained.exit_seconds = time.monotonic() - began
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return drained


async def _warm_up(served: Served, model: Model) -> None:
    connection = await Connection.open(served.serving)
    status, body = await connection.ask(model.as_json())
    await connection.close()
    if status != 200:
        raise RuntimeError(f"status {status}: {body!r}")


def main(runs: int) -> None:
    """Make the runs, and write drain.json."""
    found = []
    for number in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as name:
            found.append(drain(Path(name)))
        print(f"run {number}: {found[-1]}", flush=True)
    record = Record()
    record.claim_at_most(
        f"accepted requests lost in {runs} runs", sum(one.lost for one in found), 0
    )
    record.claim_at_most(
        f"later requests without an answer as documented in {runs} runs",
        sum(one.later.total() - one.later["200"] - one.later[_REFUSED] for one in found),
        0,
    )
    record.claim_at_most(
        f"exits other than 0 in {runs} runs", sum(one.exit_status != 0 for one in found), 0
    )
    seconds = statistics.median(one.exit_seconds for one in found)
    record.notes.append(
        f"{sum(one.accepted.total() for one in found)} accepted and "
        f"{sum(one.later.total() for one in found)} later requests; "
        f"the agent ended {seconds:.2f} s after its last client (median)"
    )
    record.extra = {
        "runs": [
            {
                "accepted": dict(one.accepted),
                "later": dict(one.later),
                "exitStatus": one.exit_status,
                "exitSeconds": round(one.exit_seconds, 3),
            }
            for one in found
        ]
    }
    print(f"written to {write('drain', record)}")
