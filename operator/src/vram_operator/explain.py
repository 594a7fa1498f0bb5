"""``vram-operator explain``: what the operator would do for one workload now, and why.

Called by `cli`. Gathers and plans as the operator does, from lists instead of watches, and acts on
nothing: its client refuses every request that would change something. An agent's report is read
from the pod's address, and where that cannot be reached from here, through the apiserver.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import NoReturn

import aiohttp
from vram_agent.protocol import Report

from vram_operator.acting import plan_settings
from vram_operator.agent_client import AgentAddress, AgentClient, AgentError, parse_report
from vram_operator.api import TRUST_CONFIG_MAP, TRUST_KEY
from vram_operator.cache import Cache, Key
from vram_operator.clock import Clock
from vram_operator.core.evidence import history_seconds
from vram_operator.core.explanation import explain
from vram_operator.core.planning import plan
from vram_operator.core.snapshot import Pod, Snapshot
from vram_operator.facts import Facts
from vram_operator.gather import Gatherer, InvalidWorkloadError
from vram_operator.kube import CONFIG_MAPS, PODS, Api, ApiError, ApiUnavailableError, Connection
from vram_operator.operate import ensure_crds
from vram_operator.queue import RetryError
from vram_operator.resync import resync
from vram_operator.settings import Settings

UNKNOWN_IMAGE = "the-image-of-the-operator"
"""Stands for --agent-image where it is not given: which image it is decides nothing."""


class ExplainError(Exception):
    """Nothing can be explained; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Question:
    """Which workload, and for how long its agents are listened to before the answer."""

    key: Key
    listen_seconds: float = 0.0


async def answer(
    connection: Connection, settings: Settings, question: Question, clock: Clock
) -> str:
    """Return the explanation as text. Raises ExplainError."""
    async with connection.session() as session, aiohttp.ClientSession() as to_agents:
        api = Api(connection, session, _refuse_to_act)
        explainer = Explainer(api, AgentClient(to_agents, _refuse_to_act), clock, settings)
        try:
            await ensure_crds(api)
            return await explainer.answer(question)
        except (ApiError, ApiUnavailableError) as error:
            raise ExplainError(f"{connection.server}: {error}") from error
        except RetryError as error:
            raise ExplainError(str(error)) from error


class Explainer:
    """Builds one snapshot and says what follows from it."""

    def __init__(self, api: Api, agents: AgentClient, clock: Clock, settings: Settings) -> None:
        self._api = api
        self._agents = agents
        self._clock = clock
        self._settings = settings
        self._cache = Cache(clock)
        self._facts = Facts()
        planning = plan_settings(settings)
        self._gatherer = Gatherer(
            api,
            self._cache,
            self._facts,
            clock,
            replace(planning, agent_image=planning.agent_image or UNKNOWN_IMAGE),
        )

    async def answer(self, question: Question) -> str:
        """List, listen, plan, say what came of it. Raises ExplainError and what the API raises."""
        notes = await self._list(question.key[0])
        await self._trust_what_is_there(question.key[0])
        snapshot = await self._gather(question.key)
        await self._listen(snapshot, question.listen_seconds)
        snapshot = await self._gather(question.key)
        now = self._clock.now()
        notes += _say_shortcomings(snapshot, question)
        text = explain(snapshot, plan(snapshot, now), now)
        return "\n".join([text, *(["notes", *(f"  {note}" for note in notes)] if notes else [])])

    async def _list(self, namespace: str) -> list[str]:
        """Fill the cache; who may not list all namespaces sees this one alone."""
        namespaces = self._settings.namespaces
        try:
            await resync(self._api, self._cache, namespaces)
        except ApiError as error:
            if error.status != 403 or namespaces == (namespace,):
                raise
            await resync(self._api, self._cache, (namespace,))
            return [f"pods and restarts of other namespaces are not counted: {error.message}"]
        return []

    async def _trust_what_is_there(self, namespace: str) -> None:
        """Take the namespace's public keys as right: which ones are is the operator's secret."""
        found = await self._api.find(CONFIG_MAPS.path(namespace, TRUST_CONFIG_MAP))
        keys = ((found or {}).get("data") or {}).get(TRUST_KEY, "")
        self._gatherer.public_keys = lambda: keys

    async def _gather(self, key: Key) -> Snapshot:
        try:
            snapshot = await self._gatherer.gather(key)
        except InvalidWorkloadError as error:
            raise ExplainError(
                f"GPUModelWorkload {key[0]}/{key[1]} cannot be read: {error}"
            ) from error
        if snapshot is None:
            raise ExplainError(
                f"there is no GPUModelWorkload {key[1]} in namespace {key[0]}; "
                "kubectl get gmw -A lists them"
            )
        return snapshot

    async def _listen(self, snapshot: Snapshot, seconds: float) -> None:
        """Ask every agent for its report, and again and again for so long."""
        interval = self._settings.poll_interval_seconds / 2
        end = self._clock.monotonic() + seconds
        while True:
            pods = (pod for pod in snapshot.pods if pod.is_present)
            await asyncio.gather(*(self._ask(snapshot, pod) for pod in pods))
            left = end - self._clock.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(interval, left))

    async def _ask(self, snapshot: Snapshot, pod: Pod) -> None:
        workload = snapshot.workload
        kept = history_seconds(workload.spec.restart.residual, self._settings.poll_interval_seconds)
        try:
            report = await self._report(workload.namespace, pod)
            self._facts.record_report(pod.uid, report, self._clock.now(), kept)
        except (AgentError, ValueError) as error:
            self._facts.record_silence(pod.uid, str(error))

    async def _report(self, namespace: str, pod: Pod) -> Report:
        """Return the pod's report: from its address, else through the apiserver."""
        if not pod.ip or not pod.control_port:
            raise AgentError("the pod has no address or no control port yet")
        try:
            return await self._agents.report(AgentAddress(pod.ip, pod.control_port, pod.uid))
        except AgentError as error:
            direct = error
        path = PODS.path(namespace, f"{pod.name}:{pod.control_port}", "proxy/report")
        try:
            found = await self._api.get(path)
            return parse_report(json.dumps(found).encode(), path, pod.uid)
        except (ApiError, ApiUnavailableError, AgentError) as error:
            raise AgentError(f"{direct}; and through the apiserver: {error}") from error


def _say_shortcomings(snapshot: Snapshot, question: Question) -> list[str]:
    """Return how what is seen here may differ from what the operator has seen."""
    notes = ["flags of the operator that are not given here are taken at their defaults"]
    residual = snapshot.workload.spec.restart.residual
    if residual is not None and question.listen_seconds < residual.for_seconds:
        listened = f"agents were listened to for {question.listen_seconds:.0f} s"
        proof = f"{residual.min_samples} reports over {residual.for_seconds} s"
        flag = f"--listen {residual.for_seconds + 10}"
        notes.append(f"{listened}, and evidence takes {proof}: {flag} waits for that")
    return notes


def _refuse_to_act() -> NoReturn:
    raise RuntimeError("vram-operator explain changes nothing")
