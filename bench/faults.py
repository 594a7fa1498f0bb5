"""Many runs of each fault between operator and apiserver, and many failovers: lost and double.

Nothing here fails by a figure. The apiserver is a real one, the operators are processes; the agents
are protocol-true and count what they carry out. A run that did not come to its end is written down
as such.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests import cluster
from tests.integration.operator.client import eventually
from tests.integration.operator.conftest import open_world, prepared
from tests.integration.operator.storm import Cluster, run_storm
from tests.integration.operator.weather import KINDS

RESULTS = Path(__file__).parent / "results" / "faults.json"
PATIENCE_SECONDS = 90


@dataclass
class Row:
    """What all runs of one kind came to."""

    kind: str
    runs: int = 0
    asked: int = 0
    lost: int = 0
    double: int = 0
    faults: int = 0
    unfinished: list[str] = field(default_factory=list)


async def measure_storms(at: Cluster, runs: int, rows: list[Row]) -> None:
    """Run every kind so many times, one after the other; ``rows`` are filled as they come."""
    rows += [Row(kind) for kind in KINDS]
    for number in range(runs):
        for row in rows:
            folder = at.folder / f"{number}-{len(row.kind)}-{row.kind[:3]}"
            try:
                tally = await run_storm(
                    Cluster(at.server, at.kubeconfig, folder), row.kind, seed=1000 + number
                )
            except AssertionError as error:
                row.unfinished.append(f"seed {1000 + number}: {str(error)[:200]}")
                continue
            row.runs += 1
            row.asked += tally.asked
            row.lost += tally.lost
            row.double += tally.double
            row.faults += tally.faults
            print(f"{row.kind}: {tally}", flush=True)


async def measure_failover(at: Cluster, *, clean: bool) -> float:
    """Return seconds from the end of the leader to the moment at which the standby leads."""
    folder = at.folder / f"failover-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    async with open_world(at.server, at.kubeconfig, folder) as world:
        first = await world.start()
        await eventually(first.is_leading, "the first leads", PATIENCE_SECONDS)
        second = await world.start()
        began = time.monotonic()
        if clean:
            await first.terminate()
        else:
            first.kill()
        await eventually(second.is_leading, "the second leads", PATIENCE_SECONDS)
        return time.monotonic() - began


async def measure(at: Cluster, runs: int) -> dict[str, Any]:
    """Return everything as JSON."""
    rows: list[Row] = []
    await measure_storms(at, runs, rows)
    failovers = {}
    for name, clean in (("killed", False), ("stopped", True)):
        seconds = [await measure_failover(at, clean=clean) for _ in range(max(1, runs // 2))]
        failovers[name] = {
            "runs": len(seconds),
            "medianSeconds": round(statistics.median(seconds), 2),
            "longestSeconds": round(max(seconds), 2),
            "samples": [round(one, 2) for one in seconds],
        }
        print(f"failover, leader {name}: {failovers[name]}", flush=True)
    return {
        "faults": [asdict(row) for row in rows],
        "failover": failovers,
        "loadAverage": round(os.getloadavg()[0], 2),
    }


def main(runs: int) -> None:
    """Run against a control plane of its own, or the one that ``KUBECONFIG`` names."""
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster.up("control-plane", Path(folder) / "cluster") as plane,
        prepared(plane) as server,
    ):
        at = Cluster(server, plane.kubeconfig, Path(folder) / "runs")
        found = asyncio.run(measure(at, runs))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {RESULTS}")
