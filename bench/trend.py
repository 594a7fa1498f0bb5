"""A real model leaks at a steady pace: what is foretold, by status and metrics, and what happens.

A real kube-apiserver, the operator as a process and one real agent. The model keeps a few MiB with
each request, one request every few seconds, until its residual has passed the threshold. A trend
needs eight quiet reports over five minutes, so this takes longer than a test may.

Residual restarts are suspended, so that the threshold is really passed, and passed once.

Called by ``python -m bench trend``.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from vram_agent.protocol import CONTROL_PORT, parse_quantity

from bench.record import Record, write
from tests import cluster
from tests.integration.operator.client import Object, eventually
from tests.integration.operator.conftest import open_world, serve_control_plane
from tests.integration.operator.processes import Operator
from tests.integration.operator.real_agents import LEAKY, leak, real_agents
from tests.integration.operator.test_explain import explain
from tests.integration.operator.world import NAME, World, condition, workload

MIB = 1024**2
LEAK_MEBIBYTES = 4
LEAK_SECONDS = 5.0
THRESHOLD_MEBIBYTES = 512
LONGEST_SECONDS = 1200.0
METRIC = "vram_operator_workload_residual_"


@dataclass(frozen=True)
class Foretold:
    """One trend that the status told: when, and what."""

    at: datetime
    trend: Object
    metrics: dict[str, float]


@dataclass
class Story:
    """What was foretold, and what came."""

    foretold: list[Foretold] = field(default_factory=list)
    points: list[tuple[datetime, int]] = field(default_factory=list)
    passed_at: datetime | None = None
    told: str = ""
    explained: str = ""

    @property
    def bytes_per_hour(self) -> float:
        """The pace of the leak, from the first report to the last."""
        (since, first), (until, last) = self.points[0], self.points[-1]
        return (last - first) / (until - since).total_seconds() * 3600


async def tell(world: World, operator: Operator, kubeconfig: Path) -> Story:
    """Leak until the threshold is passed; return what was seen meanwhile."""
    story, deadline = Story(), time.monotonic() + LONGEST_SECONDS
    (running,) = world.kubelet.running.values()
    await leak(running.ip, LEAK_MEBIBYTES)
    while story.passed_at is None:
        assert time.monotonic() < deadline, story.points[-1:]
        began = time.monotonic()
        await leak(running.ip, LEAK_MEBIBYTES)
        residual = await _residual_bytes(running.ip)
        now = datetime.now(UTC)
        story.points.append((now, residual))
        if residual > THRESHOLD_MEBIBYTES * MIB:
            story.passed_at = now
        await _listen(world, operator, story, now)
        if story.foretold and not story.explained:
            place = f"{world.client.namespace}/{NAME}"
            _, story.explained, _ = await explain(kubeconfig, place, "--schedule-jitter", "0")
            story.told = condition(await world.workload(), "Restarting")["message"]
        await asyncio.sleep(max(0.0, LEAK_SECONDS - (time.monotonic() - began)))
    return story


async def _residual_bytes(ip: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{ip}:{CONTROL_PORT}/report") as response,
    ):
        report: Object = await response.json()
    return int(report["memory"]["residualBytes"])


async def _listen(world: World, operator: Operator, story: Story, now: datetime) -> None:
    status = (await world.workload() or {}).get("status") or {}
    trend = (status.get("vram") or {}).get("trend")
    if trend is None or (story.foretold and story.foretold[-1].trend == trend):
        return
    text = (await operator.probe("/metrics"))[1]
    found = re.findall(rf"^{METRIC}(\w+){{.*}} (.*)$", text, re.MULTILINE)
    story.foretold.append(Foretold(now, trend, {name: float(value) for name, value in found}))
    print(f"{now:%H:%M:%S} {trend} {story.foretold[-1].metrics}", flush=True)


def main() -> None:
    """Run the story, and write trend.json."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with (
            cluster.up("control-plane", place / "cluster") as running,
            serve_control_plane(running) as server,
        ):
            story = asyncio.run(_run(server, running.kubeconfig, place))
    record = Record()
    _claim(record, story)
    record.extra = {
        "leak": f"{LEAK_MEBIBYTES} MiB every {LEAK_SECONDS:.0f} s",
        "threshold": f"{THRESHOLD_MEBIBYTES}Mi",
        "bytesPerHour": round(story.bytes_per_hour),
        "passedAt": f"{story.passed_at:%Y-%m-%dT%H:%M:%SZ}",
        "foretold": [
            {"at": f"{one.at:%Y-%m-%dT%H:%M:%SZ}", "trend": one.trend, "metrics": one.metrics}
            for one in story.foretold
        ],
        "describe": story.told,
        "explain": story.explained.splitlines(),
    }
    print(f"written to {write('trend', record)}")


async def _run(server: str, kubeconfig: Path, folder: Path) -> Story:
    async with open_world(server, kubeconfig, folder) as world:
        world.kubelet.make_container = real_agents(folder)
        operator = await world.start("--poll-interval=5")
        body = workload(
            residual={"threshold": f"{THRESHOLD_MEBIBYTES}Mi", "forSeconds": 30},
            suspend=True,
        )
        body["spec"]["models"] = [LEAKY]
        body["spec"]["template"]["spec"] = {"tolerations": [{"operator": "Exists"}]}
        await world.create(body)
        await eventually(world.until_ready, "the workload is ready", 120)
        return await tell(world, operator, kubeconfig)


def _claim(record: Record, story: Story) -> None:
    """Hold the first forecast against what came, and the metrics against the status."""
    assert story.passed_at is not None
    first = story.foretold[0]
    trend: dict[str, Any] = first.trend
    ahead = (story.passed_at - first.at).total_seconds()
    foretold_at = datetime.fromisoformat(trend["thresholdTime"])
    off = abs((foretold_at - story.passed_at).total_seconds())
    record.notes.append(
        f"first foretold {ahead:.0f} s ahead, as {trend['thresholdTime']}; {off:.0f} s off "
        "(a status tells whole minutes)"
    )
    growth = parse_quantity(trend["growthPerHour"])
    record.claim_at_most(
        "growth an hour in the status, away from the real pace",
        abs(growth / story.bytes_per_hour - 1),
        0.25,
    )
    record.claim_at_most("threshold time, seconds away from when it was passed", off, 120)
    record.claim_at_least("out of memory, foretold too", float("outOfMemoryTime" in trend), 1)
    slope = first.metrics["slope_bytes_per_second"] * 3600
    record.claim_at_most(
        "growth an hour in the metrics, away from the real pace",
        abs(slope / story.bytes_per_hour - 1),
        0.25,
    )
    off = abs(first.metrics["threshold_timestamp_seconds"] - story.passed_at.timestamp())
    record.claim_at_most("threshold time of the metrics, seconds away", off, 120)
