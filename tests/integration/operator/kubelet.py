"""Plays the kubelet of one namespace: runs an agent for each pod and writes the pod's status.

There is no node behind the local control plane, so pods that a Deployment made would stay Pending.
This binds them to a node object, gives each an address of its own on the loopback network, starts
the agent there, reports it Running and Ready, starts it again when PID 1 ends, and takes it down
when the pod is deleted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from vram_agent.protocol import CONTROL_PORT, PodIdentity

from tests.integration.operator.client import CORE, Client, Object, Refused
from tests.support.agents import FakeAgent, Script

PERIOD_SECONDS = 0.1
"""How often pods are looked at, in a namespace of a few."""
_numbers = itertools.count(1)


class Container(Protocol):
    """The one process of a pod."""

    async def start(self, host: str, port: int) -> int: ...

    async def stop(self) -> None: ...

    def reboot(self) -> None: ...


@dataclass
class Running:
    """A pod that runs here."""

    pod: Object
    ip: str
    container: Any
    started: datetime
    restarts: int = 0
    exited: bool = False
    finished: datetime | None = None


@dataclass
class Kubelet:
    """``age_seconds`` is for how long a new pod's container claims to have run already.

    Pods go to ``nodes`` in turn; a node object must be there for each, or its pods are removed.
    """

    client: Client
    nodes: Sequence[str]
    scripts: Callable[[], Script] = Script
    age_seconds: float = 3600.0
    restart_seconds: float = 0.3
    period_seconds: float = PERIOD_SECONDS
    running: dict[str, Running] = field(default_factory=dict)
    history: list[Running] = field(default_factory=list)
    make_container: Callable[[Kubelet, Object], Container] | None = None
    _bound: int = 0
    _starting_again: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Play until cancelled."""
        try:
            while True:
                for pod in await self.client.items(CORE, "pods"):
                    with suppress(Refused):  # the pod changed under our hands; look again
                        await self._tend(pod)
                await asyncio.sleep(self.period_seconds)
        finally:
            for task in self._starting_again:
                task.cancel()
            for one in self.running.values():
                await one.container.stop()

    @property
    def agents(self) -> list[FakeAgent]:
        """Every fake agent that ever ran here, oldest first."""
        return [one.container for one in self.history]

    @property
    def executed(self) -> list[tuple[str, str]]:
        """Each restart that an agent carried out: ID and step."""
        return [(one.restart_id, str(one.step)) for agent in self.agents for one in agent.executed]

    async def _tend(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        known = self.running.get(uid)
        if pod["metadata"].get("deletionTimestamp"):
            await self._take_down(pod, known)
        elif not pod["spec"].get("nodeName"):
            await self._bind(pod)
        elif known is None:
            await self._start(pod)
        elif known.exited:
            known.exited = False
            task = asyncio.create_task(self._start_again(known))
            self._starting_again.add(task)
            task.add_done_callback(self._starting_again.discard)

    async def _bind(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        node = self.nodes[self._bound % len(self.nodes)]
        self._bound += 1
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": target,
        }
        await self.client.send("POST", self.client.path(CORE, "pods", name, "binding"), body)

    async def _start(self, pod: Object) -> None:
        # Each test process and each pod has an address that no other has.
        number = next(_numbers)
        ip = f"127.{(os.getpid() // 250) % 250 + 1}.{os.getpid() % 250 + 1}.{number % 250 + 1}"
        make = self.make_container or Kubelet.fake_agent
        started = datetime.now(UTC) - timedelta(seconds=self.age_seconds)
        one = Running(pod, ip, make(self, pod), started)
        one.container.on_exit = lambda: setattr(one, "exited", True)
        await one.container.start(ip, CONTROL_PORT)
        self.running[pod["metadata"]["uid"]] = one
        self.history.append(one)
        await self._write_status(one, ready=True)

    def fake_agent(self, pod: Object) -> FakeAgent:
        """Make the agent that stands in a pod unless a test says otherwise."""
        metadata = pod["metadata"]
        identity = PodIdentity(
            namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"]
        )
        keys = TrustFile(self.client)
        keys.refresh_soon()
        return FakeAgent(identity, keys.read, self.scripts())

    async def _start_again(self, one: Running) -> None:
        await one.container.stop()
        one.finished = datetime.now(UTC)
        with suppress(Refused):  # the pod is on its way out
            await self._write_status(one, ready=False)
        await asyncio.sleep(self.restart_seconds)
        if self.running.get(one.pod["metadata"]["uid"]) is not one:
            return
        one.restarts, one.started = one.restarts + 1, datetime.now(UTC)
        one.container.reboot()
        await one.container.start(one.ip, CONTROL_PORT)
        with suppress(Refused):
            await self._write_status(one, ready=True)

    async def _take_down(self, pod: Object, known: Running | None) -> None:
        if known is not None:
            del self.running[pod["metadata"]["uid"]]
            await known.container.stop()
        await self.client.delete(
            CORE,
            "pods",
            pod["metadata"]["name"],
            gracePeriodSeconds=0,
            preconditions={"uid": pod["metadata"]["uid"]},
        )

    async def _write_status(self, one: Running, *, ready: bool) -> None:
        metadata, spec = one.pod["metadata"], one.pod["spec"]
        now = _text(datetime.now(UTC))
        state = {"running": {"startedAt": _text(one.started)}} if ready else {"waiting": {}}
        finished = one.finished or one.started
        last = {"terminated": {"exitCode": 0, "finishedAt": _text(finished)}}
        conditions = [
            {"type": kind, "status": str(ready), "lastTransitionTime": now}
            for kind in ("Ready", "ContainersReady")
        ]
        status = {
            "phase": "Running",
            "podIP": one.ip,
            "podIPs": [{"ip": one.ip}],
            "hostIP": "127.0.0.1",
            "startTime": _text(one.started),
            "conditions": [
                *conditions,
                {"type": "Initialized", "status": "True", "lastTransitionTime": now},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
            ],
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": "",
                    "ready": ready,
                    "started": ready,
                    "restartCount": one.restarts,
                    "state": state,
                    "lastState": last if one.restarts or not ready else {},
                }
                for container in spec["containers"]
            ],
        }
        path = self.client.path(CORE, "pods", metadata["name"], "status")
        await self.client.merge(path, {"status": status})


class TrustFile:
    """The mounted ConfigMap ``vram-agent-trust``, as the kubelet would keep it up to date."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._content = ""
        self._task: asyncio.Task[None] | None = None

    def refresh_soon(self) -> None:
        self._task = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        while not self._content:
            found = await self._client.find(CORE, "configmaps", "vram-agent-trust")
            self._content = (found or {}).get("data", {}).get("keys.pem", "")
            await asyncio.sleep(PERIOD_SECONDS)

    def read(self) -> str:
        return self._content


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def describe(objects: list[Object]) -> str:
    """Show objects in a failure."""
    return json.dumps(objects, indent=1)[:20_000]
