"""A workload's hour in a minute, watched by a real Prometheus: what dashboards have to show.

Loads, restores, offloads and an eviction; requests and an unload; a leak that is blocked, then
recycled away; a restart in place. Played by the test of the dashboards and by what draws them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
from vram_agent.protocol import CONTROL_PORT, SERVING_PORT

from tests import models
from tests.integration.operator.client import VRAM, Object, eventually
from tests.integration.operator.processes import Operator
from tests.integration.operator.real_agents import MODELS
from tests.integration.operator.world import NAME, World, condition, manual_restart, workload
from tests.support.prometheus import Prometheus, Target

# Room for one of the two models that declare a size.
SIZE, BUDGET = "600Mi", "1000Mi"
LEAK_MEBIBYTES = 400


def monitored_workload() -> Object:
    """Two ONNX models that have to take turns, and one that leaks."""
    body = workload(residual={"threshold": "256Mi", "forSeconds": 1, "minSamples": 2}, suspend=True)
    stays = {"idleTimeoutSeconds": 0}
    body["spec"]["models"] = [
        {
            "name": "digits",
            "runtime": "ONNX",
            "source": str(models.DIGITS),
            "vram": SIZE,
            "residency": {"afterTask": "Offload", "offloadTier": "PinnedHost", **stays},
        },
        {
            "name": "numbers",
            "runtime": "ONNX",
            "source": str(models.DIGITS),
            "vram": SIZE,
            "residency": {"afterTask": "Keep", "offloadTier": "Host", **stays},
        },
        {
            "name": "leaky",
            "runtime": "Python",
            "source": "leaky:make",
            "options": {"path": str(MODELS)},
            "residency": {"afterTask": "Keep", "offloadTier": "PinnedHost", **stays},
        },
    ]
    body["spec"]["vram"] = {"budget": BUDGET, "warnAbove": "200Mi"}
    return body


@dataclass
class Monitored:
    """What runs: the world with one agent, the operator, Prometheus."""

    world: World
    operator: Operator
    prometheus: Prometheus

    @property
    def address(self) -> str:
        """Of the one pod, which keeps it through restarts in place."""
        (one,) = self.world.kubelet.running.values()
        return str(one.ip)

    async def watch(self) -> None:
        """Have Prometheus scrape both, with the labels that the chart's PodMonitors give."""
        (pod,) = await self.world.pods()
        metadata = pod["metadata"]
        await self.prometheus.start(
            [
                Target(f"127.0.0.1:{self.operator.port}", "operator", {"pod": "vram-operator-0"}),
                Target(
                    f"{self.address}:{CONTROL_PORT}",
                    "agents",
                    {
                        "namespace": metadata["namespace"],
                        "pod": metadata["name"],
                        "workload": NAME,
                    },
                ),
            ]
        )
        await eventually(self.prometheus.is_scraping, "Prometheus scrapes both", 60)

    async def post(self, path: str, body: Any) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{self.address}:{SERVING_PORT}{path}", json=body) as response,
        ):
            assert response.status == 200, await response.text()

    async def recognise(self, model: str, times: int = 1) -> None:
        """Ask so many times at once."""
        audio = {"name": "audio", "shape": [1, 16000], "datatype": "FP32", "data": [0.0] * 16000}
        requests = [
            self.post(f"/v2/models/{model}/infer", {"inputs": [audio]}) for _ in range(times)
        ]
        await asyncio.gather(*requests)

    async def leak(self, mebibytes: int) -> None:
        size = {"name": "mebibytes", "shape": [1], "datatype": "INT64", "data": [mebibytes]}
        await self.post("/v2/models/leaky/infer", {"inputs": [size]})

    async def until(self, expression: str) -> None:
        """Wait until Prometheus has seen a series that is more than 0."""

        async def seen() -> bool:
            return await self.prometheus.value(expression) > 0

        await eventually(seen, f"in Prometheus: {expression}", 60)


async def play(monitored: Monitored) -> tuple[float, float]:
    """Play the story to its end; returns when it began and ended, in Unix seconds."""
    began = time.time()
    await _take_turns(monitored)
    await _leak_and_recycle(monitored)
    await _restart_in_place(monitored)
    return began, time.time()


async def _take_turns(monitored: Monitored) -> None:
    """Requests that load, restore, offload, wait and evict; then an unload by hand."""
    for _ in range(2):
        await monitored.recognise("digits", 4)
        await monitored.until('vram_agent_model_state{model="digits", state="Offloaded"}')
        await monitored.recognise("numbers", 2)
        await monitored.until('vram_agent_model_state{model="numbers", state="Resident"}')
    await monitored.recognise("digits")
    await monitored.post("/v2/repository/models/numbers/unload", {})
    await monitored.until('vram_agent_model_state{model="numbers", state="Absent"}')


async def _leak_and_recycle(monitored: Monitored) -> None:
    """A residual restart that `suspend` blocks until it is taken away."""
    world = monitored.world
    await monitored.leak(LEAK_MEBIBYTES)
    await monitored.until('vram_operator_restarts_blocked{reason="Suspended"}')
    path = world.client.path(VRAM, "gpumodelworkloads", NAME)
    await world.client.merge(path, {"spec": {"restart": {"suspend": False}}})
    (recycled,) = await world.until_finished(1, 90)
    assert recycled["status"]["outcome"] == "Recovered", recycled["status"]
    await monitored.recognise("digits", 2)
    # Seen before the next restart, with which the agent counts anew.
    await monitored.until("vram_agent_worker_restarts_total")


async def _restart_in_place(monitored: Monitored) -> None:
    world = monitored.world
    (pod,) = await world.pods()
    await world.create(manual_restart("by-hand", pod["metadata"]["name"]))
    *_, restarted = await world.until_finished(2, 90)
    assert restarted["status"]["outcome"] == "Recovered", restarted["status"]
    assert condition(restarted, "Restarted")["status"] == "True"
    await monitored.recognise("digits", 3)
    await monitored.recognise("numbers", 3)
    await monitored.until("vram_operator_restart_downtime_seconds_count")
