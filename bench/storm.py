"""Hundreds of pods leak at once: how many restart at a time, how long it takes, what it costs.

A real kube-apiserver and the operator as a process of its own. No kubelet runs: pods are bound and
made ready by `tests.integration.operator.kubelet`, which starts an agent on an address of its own
for each. A few agents are real ones that leak in a real model; the others speak the agent's
protocol (types, tokens, restart IDs) and hold no model: `tests.support.agents`.

Two look on who are not the operator: a watch of the GPUPodRestarts, in the apiserver's order, and
the agents themselves, which write down when they began and ended what they were told to do.

Called by ``python -m bench storm`` and, with fewer pods, by tests/integration/operator/test_storm.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.record import Record, write
from tests import cluster
from tests.integration.operator.client import CORE, VRAM, Client, Object, eventually
from tests.integration.operator.conftest import open_world, serve_control_plane
from tests.integration.operator.processes import Operator
from tests.integration.operator.real_agents import LEAKY, leak, real_agents
from tests.integration.operator.world import World, condition, workload

MIB = 1024**2
REAL = "real"
LEAKED_MEBIBYTES = 400
RESIDUAL = {"threshold": "256Mi", "forSeconds": 2, "minSamples": 2}
PODS_ON_A_NODE = 4
RECYCLE_SECONDS = 1.0
"""How long a recycle of an agent without a model takes; that of a real one takes what it takes."""
LIMIT_SECONDS = 900.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many pods, in how many workloads; ``real`` of them, in one more, have a real agent."""

    workloads: int
    replicas: int
    real: int
    stubborn: int = 0
    """Of each workload, how many agents give nothing back until their container ends."""

    @property
    def pods(self) -> int:
        return self.workloads * self.replicas + self.real

    @property
    def names(self) -> list[str]:
        return [f"storm-{number}" for number in range(self.workloads)] + [REAL] * bool(self.real)


@dataclass(kw_only=True)
class Observed:
    """What the apiserver showed to somebody else than the operator."""

    most_active: int = 0
    most_on_one_node: int = 0
    active_over_time: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Storm:
    """What came of it. ``requests`` are the operator's to the apiserver, by verb and resource."""

    pods: int
    cap: int
    observed: Observed
    most_acting: int
    """By the agents' own account; a real agent's is not in it."""
    seconds: float
    """From the leak to the last outcome."""
    outcomes: Counter[str]
    restarts_of_pods: Counter[str]
    requests: Counter[str]
    events: Counter[str]
    cpu_seconds: float
    rss_bytes: int
    errors: Counter[str]


async def watch(client: Client, nodes: dict[str, str], observed: Observed) -> None:
    """Count the restarts that run, at each change, until cancelled."""
    active: dict[str, str] = {}
    path = client.server + client.path(VRAM, "gpupodrestarts")
    listed = await client.send("GET", client.path(VRAM, "gpupodrestarts"))
    assert listed["items"] == []
    parameters = {"watch": "1", "resourceVersion": listed["metadata"]["resourceVersion"]}
    began = time.monotonic()
    async with client.session.get(
        path, params=parameters, timeout=aiohttp.ClientTimeout(total=None)
    ) as events:
        async for line in events.content:
            restart = json.loads(line)["object"]
            name = restart["metadata"]["name"]
            if is_running(restart):
                active[name] = nodes[restart["spec"]["pod"]["name"]]
            elif active.pop(name, None) is None:
                continue
            observed.active_over_time.append((time.monotonic() - began, len(active)))
            observed.most_active = max(observed.most_active, len(active))
            on_one = max(Counter(active.values()).values(), default=0)
            observed.most_on_one_node = max(observed.most_on_one_node, on_one)


def is_running(restart: Object) -> bool:
    """Was the restart admitted, and has it not ended?"""
    finished = (restart.get("status") or {}).get("outcome")
    return not finished and condition(restart, "Admitted").get("status") == "True"


async def storm(world: World, shape: Shape, folder: Path) -> Storm:
    """Make every pod leak at once, wait until all have recovered, return what was seen."""
    _prepare(world, shape, folder)
    operator = await world.start("--poll-interval=2", "--max-concurrent-restarts=10%")
    for name in shape.names:
        await world.create(_workload(name, shape))
    await eventually(lambda: _all_report(world, shape), "all agents report", LIMIT_SECONDS)
    pods = await world.client.items(CORE, "pods")
    nodes = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in pods}
    observed = Observed()
    watching = asyncio.create_task(watch(world.client, nodes, observed))
    before, cpu_before = await _scrape(operator), cpu_seconds(operator.pid)

    began = time.monotonic()
    await _leak(world)
    restarts = await eventually(
        lambda: _all_ended(world, shape), f"{shape.pods} ended restarts", LIMIT_SECONDS
    )
    seconds = time.monotonic() - began
    assert restarts is not None

    after, cpu_after = await _scrape(operator), cpu_seconds(operator.pid)
    rss_bytes = peak_rss_bytes(operator.pid)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    events = await world.client.items("/apis/events.k8s.io/v1", "events")
    ours = [one for one in events if one["regarding"]["kind"] == "GPUModelWorkload"]
    return Storm(
        pods=shape.pods,
        cap=max(1, shape.pods // 10),
        observed=observed,
        most_acting=_most_at_once(world),
        seconds=seconds,
        outcomes=Counter(one["status"]["outcome"] for one in restarts),
        restarts_of_pods=Counter(one["spec"]["pod"]["uid"] for one in restarts),
        requests=_sums(after, before, "api_requests_total", ("verb", "resource")),
        events=Counter(one["reason"] for one in ours),
        cpu_seconds=cpu_after - cpu_before,
        rss_bytes=rss_bytes,
        errors=_sums(after, before, "reconcile_errors_total", ("error",)),
    )


def _prepare(world: World, shape: Shape, folder: Path) -> None:
    """Have the world's kubelet start the agents that the shape asks for."""
    make_real = real_agents(folder)
    made: Counter[str] = Counter()

    def make(kubelet: Any, pod: Object) -> Any:
        name = pod["metadata"]["labels"]["vram.dev/workload"]
        if name == REAL:
            return make_real(kubelet, pod)
        made[name] += 1
        agent = kubelet.fake_agent(pod)
        agent.script.recycle_seconds = RECYCLE_SECONDS
        if made[name] <= shape.stubborn:
            agent.script.after_recycle_bytes = LEAKED_MEBIBYTES * MIB
        return agent

    world.kubelet.make_container = make
    # Two hundred pods in a list take their time, and it is the operator that is to be measured.
    world.kubelet.period_seconds = 0.1 + shape.pods / 200


def _workload(name: str, shape: Shape) -> Object:
    body = workload(residual=RESIDUAL, maxUnavailable="100%")
    body["metadata"]["name"] = name
    template = body["spec"]["template"]
    template["replicas"] = shape.real if name == REAL else shape.replicas
    # Nobody keeps these nodes' leases up to date.
    template["spec"] = {"tolerations": [{"operator": "Exists"}]}
    if name == REAL:
        body["spec"]["models"] = [LEAKY]
    return body


async def _all_report(world: World, shape: Shape) -> bool:
    found = await world.client.items(VRAM, "gpumodelworkloads")
    counts = [one.get("status", {}).get("agents", {}).get("reporting", 0) for one in found]
    pushed = all(
        agent.generation == 1 for agent in world.kubelet.agents if hasattr(agent, "generation")
    )
    return sum(counts) == shape.pods and pushed


async def _leak(world: World) -> None:
    """Have every agent hold what it should give back; the real ones first, as it takes longest."""
    running = list(world.kubelet.running.values())
    real = [one for one in running if not hasattr(one.container, "script")]
    await asyncio.gather(*(leak(one.ip, LEAKED_MEBIBYTES) for one in real))
    for one in running:
        if one not in real:
            one.container.script.residual_bytes = LEAKED_MEBIBYTES * MIB


async def _all_ended(world: World, shape: Shape) -> list[Object] | None:
    await asyncio.sleep(min(1.0, shape.pods / 200))
    found = await world.restarts()
    ended = [one for one in found if (one.get("status") or {}).get("outcome")]
    return ended if len(ended) >= shape.pods and len(ended) == len(found) else None


def _most_at_once(world: World) -> int:
    """Return how many agents without a model did something at the same time."""
    done = [
        one
        for running in world.kubelet.history
        if hasattr(running.container, "executed")
        for one in running.container.executed
    ]
    assert all(one.ended is not None for one in done)
    return most_at_once((one.began, one.ended or 0.0) for one in done)


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """Return how many spans of time lie over each other at most."""
    steps = sorted(step for began, ended in spans for step in ((began, 1), (ended, -1)))
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


async def _scrape(operator: Operator) -> str:
    return (await operator.probe("/metrics"))[1]


def _sums(after: str, before: str, name: str, labels: Sequence[str]) -> Counter[str]:
    """Return what a counter grew by, summed by some of its labels."""
    found: Counter[str] = Counter()
    for text, sign in ((after, 1), (before, -1)):
        for line in re.findall(rf"^vram_operator_{name}\{{(.*)\}} (.*)$", text, re.MULTILINE):
            values = dict(re.findall(r'(\w+)="([^"]*)"', line[0]))
            found[" ".join(values[label] for label in labels)] += sign * round(float(line[1]))
    return Counter({key: count for key, count in found.items() if count})


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, its threads' included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes(pid: int) -> int:
    """Return the most memory that a process had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(kibibytes) * 1024


@asynccontextmanager
async def nodes_for(client: Client, count: int) -> AsyncIterator[list[str]]:
    """Make node objects for the time of the block."""
    names = [f"storm-node-{number}" for number in range(count)]
    for name in names:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        await client.send("POST", "/api/v1/nodes", {**node, "spec": {"unschedulable": True}})
    try:
        yield names
    finally:
        for name in names:
            await client.send("DELETE", f"/api/v1/nodes/{name}")


@asynccontextmanager
async def storm_world(
    server: str, kubeconfig: Path, folder: Path, shape: Shape
) -> AsyncIterator[World]:
    """A namespace, and nodes for the shape."""
    async with open_world(server, kubeconfig, folder) as world:
        count = -(-shape.pods // PODS_ON_A_NODE)
        async with nodes_for(world.client, count) as names:
            world.kubelet.nodes = names
            yield world


SHAPES = {
    "15 workloads": Shape(workloads=14, replicas=14, real=4, stubborn=1),
    "one workload, but for the real agents": Shape(workloads=1, replicas=196, real=4, stubborn=10),
}


def main() -> None:
    """Storm with 200 pods in each shape, and write storm.json."""
    record = Record()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with (
            cluster.up("control-plane", place / "cluster") as running,
            serve_control_plane(running) as server,
        ):
            for number, (title, shape) in enumerate(SHAPES.items()):
                own = place / f"storm-{number}"
                own.mkdir()
                result = asyncio.run(_run(server, running.kubeconfig, own, shape))
                _claim(record, title, result)
                found.append({"shape": title, **vars(shape), **as_json(result)})
                print(json.dumps(found[-1], indent=1))
                # Each takes minutes: what is found is kept although a later one may fail.
                record.extra = {"storms": found}
                print(f"written to {write('storm', record)}")


async def _run(server: str, kubeconfig: Path, folder: Path, shape: Shape) -> Storm:
    async with storm_world(server, kubeconfig, folder, shape) as world:
        return await storm(world, shape, folder)


def _claim(record: Record, title: str, found: Storm) -> None:
    at_most, observed = record.claim_at_most, found.observed
    at_most(f"{title}: restarts that ran at once, by a watch", observed.most_active, found.cap)
    at_most(f"{title}: of them on one node", observed.most_on_one_node, 1)
    at_most(f"{title}: agents that acted at once, by their word", found.most_acting, found.cap)
    recovered = found.outcomes["Recovered"]
    record.claim_at_least(f"{title}: recovered", recovered, found.pods)
    at_most(f"{title}: restarts of one pod", max(found.restarts_of_pods.values()), 1)


def as_json(found: Storm) -> dict[str, Any]:
    """Return the result as it is kept."""
    return {
        "pods": found.pods,
        "cap": found.cap,
        "mostActive": found.observed.most_active,
        "mostOnOneNode": found.observed.most_on_one_node,
        "mostActing": found.most_acting,
        "seconds": round(found.seconds, 1),
        "outcomes": dict(found.outcomes),
        "requestsPerRestart": round(sum(found.requests.values()) / found.pods, 1),
        "requests": dict(found.requests.most_common()),
        "events": dict(found.events),
        "operatorCpuSeconds": round(found.cpu_seconds, 1),
        "operatorPeakRssBytes": found.rss_bytes,
        "visitsThatEndedEarly": dict(found.errors),
    }
