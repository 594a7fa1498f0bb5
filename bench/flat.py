"""A hundred thousand requests: what the agent's processes hold must stay where it is.

Clients ask a tiny ONNX model over HTTP, half of them with JSON and half with binary tensors; from
time to time every process is measured as the kernel counts it. Called by ``python -m bench flat``
and, for a few thousand requests, by tests/integration/agent/test_load.py.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from bench.overhead import Model, as_served, make_tiny
from bench.record import Record, write
from bench.served import Connection, Served, serve

REQUESTS = 100_000
POINTS = 50
CLIENTS = 16
WARM_SHARE = 0.1
"""Of the points, that are left out of the growth: allocators and caches find their size."""
FLAT_BYTES = 2 << 20
"""Growth after the warm-up, over all requests, that is still called flat."""
ROLES = ("supervisor", "template", "gpu")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What the processes of one role hold after so many requests."""

    requests: int
    role: str
    rss_bytes: int
    uss_bytes: int
    fds: int


async def load(
    served: Served, model: Model, requests: int, points: int, clients: int = CLIENTS
) -> list[Point]:
    """Send the requests; return what was measured. Raises RuntimeError where one fails."""
    connections = [await Connection.open(served.serving) for _ in range(clients)]
    forms = (model.as_json(), model.as_binary())
    share = requests // points // clients

    async def ask(number: int, connection: Connection) -> None:
        for _ in range(share):
            status, body = await connection.ask(forms[number % len(forms)])
            if status != 200:
                raise RuntimeError(f"status {status}: {body!r}")

    found: list[Point] = []
    try:
        for point in range(1, points + 1):
            await asyncio.gather(*(ask(*one) for one in enumerate(connections)))
            found += measure(served, point * share * clients)
    finally:
        for connection in connections:
            await connection.close()
    return found


def measure(served: Served, requests: int) -> list[Point]:
    """Return what each role holds now."""
    points = []
    for role, pids in served.pids().items():
        processes = [psutil.Process(pid) for pid in pids]
        memory = [process.memory_full_info() for process in processes]
        points.append(
            Point(
                requests=requests,
                role=role,
                rss_bytes=sum(one.rss for one in memory),
                uss_bytes=sum(one.uss for one in memory),
                fds=sum(process.num_fds() for process in processes),
            )
        )
    return points


def growth(points: Sequence[Point], role: str, name: str) -> int:
    """Return how much a figure grew after the warm-up: medians of the last and first thirds."""
    values = [getattr(point, name) for point in points if point.role == role]
    warm = values[int(len(values) * WARM_SHARE) :]
    third = max(1, len(warm) // 3)
    return int(statistics.median(warm[-third:]) - statistics.median(warm[:third]))


def main(requests: int) -> None:
    """Send them, and write flat.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny(folder)
        with serve(folder, [as_served(model)]) as served:
            began = time.monotonic()
            points = asyncio.run(load(served, model, requests, POINTS))
            seconds = time.monotonic() - began
    record = Record()
    record.notes.append(
        f"{points[-1].requests} requests by {CLIENTS} clients in {seconds:.0f} s, all answered 200"
    )
    for role in ROLES:
        for figure, limit in (("rss_bytes", FLAT_BYTES), ("uss_bytes", FLAT_BYTES), ("fds", 0)):
            record.claim_at_most(
                f"{role} {figure.replace('_', ' ')}: growth after the warm-up",
                growth(points, role, figure),
                limit,
            )
    record.extra = {"points": [asdict(point) for point in points]}
    print(f"written to {write('flat', record)}")
