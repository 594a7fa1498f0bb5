"""A replica of the operator in the fleet: the real gather, plan and apply, and what it heard."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from vram_agent.protocol import ActionStep, Report
from vram_operator.agent_client import AgentAddress, AgentError, Answer
from vram_operator.apply import Applier, Tools
from vram_operator.cache import Cache, Key
from vram_operator.events import EventWriter
from vram_operator.facts import Facts
from vram_operator.gather import Gatherer
from vram_operator.kube import PODS, RESTARTS, Object
from vram_operator.metrics import Metrics
from vram_operator.queue import RetryError
from vram_operator.reconcile import Reconciler
from vram_operator.resync import resync

from tests.support.factories import make_pod, make_report
from tests.unit.operator.once.apiserver import Crash, MemoryApi
from tests.unit.operator.once.fleet import NAMESPACE, Agent, Fleet
from tests.unit.operator.once.judge import Heard

KEEP_SECONDS = 600


@dataclass
class Replica:
    """One process of the operator, from its start to its crash."""

    fleet: Fleet
    who: str
    loop: asyncio.AbstractEventLoop
    seen: int = 0
    """How much of the apiserver's log its watches have shown."""
    heard: dict[str, Heard] = field(default_factory=dict)
    crash_at_call: str = ""

    def __post_init__(self) -> None:
        fleet = self.fleet
        self.api = MemoryApi(fleet.server, self.who, lambda: None)
        self.cache = Cache(fleet.clock)
        self.facts = Facts()
        agents: Any = self
        metrics = Metrics()
        gatherer = Gatherer(self.api, self.cache, self.facts, fleet.clock, fleet.settings)
        gatherer.public_keys = lambda: "-----BEGIN PUBLIC KEY-----\n"
        self.applier = Applier(
            Tools(
                api=self.api,
                agents=agents,
                cache=self.cache,
                facts=self.facts,
                events=EventWriter(self.api, fleet.clock, self.who),
                metrics=metrics,
                clock=fleet.clock,
            )
        )
        self.reconciler = Reconciler(gatherer, self.applier, metrics, fleet.clock)
        fleet.judge.witnesses[self.who] = self

    # --- what the operator's shell does around visits ---------------------------------------------

    def start(self) -> None:
        """List everything and ask every agent, as before the first visit."""
        self.resync()
        self.listen()

    def known_restarts(self) -> list[Object]:
        return list(self.cache.every(RESTARTS))

    def resync(self) -> None:
        self.run(resync(self.api, self.cache, (NAMESPACE,)))
        self.seen = len(self.fleet.server.log)
        self.facts.retain({pod["metadata"]["uid"] for pod in self.cache.every(PODS)})

    def watch(self, count: int) -> None:
        """The watches show the next events."""
        for event in self.fleet.server.log[self.seen : self.seen + count]:
            self._observe(event)
        self.seen = min(self.seen + count, len(self.fleet.server.log))

    def watch_again(self, start: int, count: int) -> None:
        """The watches show old events once more, as after a reconnection."""
        for event in self.fleet.server.log[: self.seen][start : start + count]:
            if not event.deleted:
                self._observe(event)

    def _observe(self, event: Any) -> None:
        obj = copy.deepcopy(event.obj)
        if event.deleted:
            self.cache.observe_deletion(event.resource, obj)
            if event.resource is PODS:
                self.facts.forget(obj["metadata"]["uid"])
        else:
            self.cache.observe(event.resource, obj)

    def listen(self) -> None:
        """Ask every agent that is known for its report."""
        for pod in list(self.cache.every(PODS)):
            uid = pod["metadata"]["uid"]
            try:
                report = self._report(AgentAddress(pod["status"]["podIP"], 8001, uid))
            except AgentError as error:
                self.facts.record_silence(uid, str(error))
            else:
                self.facts.record_report(uid, report, self.fleet.clock.now(), KEEP_SECONDS)

    def _report(self, address: AgentAddress) -> Report:
        agent = self.fleet.at(address.ip)
        if agent is None or not agent.is_reachable or agent.uid != address.pod_uid:
            raise AgentError("no answer")
        now = self.fleet.clock.now()
        self.heard[agent.uid] = Heard(now, agent.boot, agent.epoch, agent.residual_gib)
        pod = make_pod("any", uid=agent.uid)
        return make_report(
            pod,
            agent.residual_gib,
            now,
            boot_id=f"{agent.uid}-boot-{agent.boot}",
            epoch=agent.epoch,
            action=agent.action,
            config_generation=agent.generation,
        )

    async def call(self, address: AgentAddress, method: str, path: str, body: Any) -> Answer:
        """Stand for the client of the agents."""
        for _ in range(self.api.yields):
            await asyncio.sleep(0)
        if self.crash_at_call == "before" and path in {"/recycle", "/restart"}:
            raise Crash
        agent = self.fleet.at(address.ip)
        if agent is None or not agent.is_reachable:
            return Answer(0, "no answer")
        if agent.uid != address.pod_uid:
            return Answer(401, "the token is for another pod")
        status = 200
        if method == "PUT":
            agent.generation = body["metadata"]["generation"]
        elif path in {"/recycle", "/restart"}:
            status = self._order(agent, path, body["restartID"])
        if agent.lost_answers:
            agent.lost_answers -= 1
            return Answer(0, "the answer was lost")
        return Answer(status)

    def _order(self, agent: Agent, path: str, restart_id: str) -> int:
        self.fleet.judge.see_order(self.who, agent.uid, restart_id)
        step = ActionStep.RECYCLE if path == "/recycle" else ActionStep.IN_PLACE
        status = self.fleet.begin(agent, restart_id, step)
        if self.crash_at_call == "after":
            raise Crash
        return status

    # --- visits -----------------------------------------------------------------------------------

    async def visit(self, key: Key) -> None:
        """Visit once; what the queue would repeat later ends the visit."""
        try:
            await self.reconciler.reconcile(key)
        except RetryError:
            return

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run on the loop until it ends, slow calls of it included."""

        async def whole() -> None:
            await work
            for _ in range(2 + 4 * self.api.yields):
                await asyncio.sleep(0)

        self.loop.run_until_complete(whole())
