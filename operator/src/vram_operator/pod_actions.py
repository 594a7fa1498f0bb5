"""Carries out what a plan wants of one pod: calls to its agent, evictions, deletion.

Called by `apply`. The GPUPodRestart and the pod are read live first; if either is not as the plan
thought, nothing is done. What the agent and the Eviction API answer is kept as a fact.
"""

from __future__ import annotations

import msgspec
import structlog
from vram_agent.protocol import ActionStep, RestartRequest

from vram_operator import eviction
from vram_operator.agent_client import AgentAddress, AgentClient
from vram_operator.clock import Clock
from vram_operator.core.plan import (
    CallRecycle,
    CallRestart,
    DeletePod,
    DryRunEvict,
    Evict,
    Knock,
    PushConfig,
)
from vram_operator.core.resources import config_document
from vram_operator.core.snapshot import (
    CallAnswer,
    EvictionAnswer,
    EvictionVerdict,
    Pod,
    PushAnswer,
)
from vram_operator.facts import Facts
from vram_operator.kube import PODS, Api, ApiError, Call, Object
from vram_operator.live import Live, StaleError

PodAction = PushConfig | Knock | CallRecycle | CallRestart | DryRunEvict | Evict | DeletePod

# No model can have this name: an agent that takes our calls answers 404, and nothing happens.
_NO_MODEL_PATH = "/models/-/unload"

_log = structlog.get_logger(__name__)


class PodActions:
    """Acts on pods; keeps nothing between two calls."""

    def __init__(
        self, api: Api, live: Live, agents: AgentClient, facts: Facts, clock: Clock
    ) -> None:
        self._api = api
        self._live = live
        self._agents = agents
        self._facts = facts
        self._clock = clock

    async def carry_out(self, namespace: str, action: PodAction) -> None:
        """Do one action. Raises StaleError and what the API raises."""
        match action:
            case PushConfig():
                await self._push_config(action)
            case Knock():
                await self._knock(action.pod)
            case CallRecycle():
                await self._call(namespace, action, ActionStep.RECYCLE)
            case CallRestart():
                await self._call(namespace, action, ActionStep.IN_PLACE)
            case DryRunEvict():
                await self._dry_run(namespace, action.pod)
            case Evict():
                await self._evict(namespace, action)
            case DeletePod():
                await self._delete_pod(namespace, action)

    async def _push_config(self, action: PushConfig) -> None:
        body = config_document(action.config)
        answer = await self._agents.call(_address(action.pod), "PUT", "/config", body)
        self._facts.record_push(
            action.pod.uid,
            PushAnswer(
                generation=action.config.metadata.generation,
                at=self._clock.now(),
                status=answer.status,
                message=answer.message,
            ),
        )
        _log.info("config pushed", pod=action.pod.name, status=answer.status)

    async def _knock(self, pod: Pod) -> None:
        answer = await self._agents.call(_address(pod), "POST", _NO_MODEL_PATH, {})
        self._facts.record_word(pod.uid, answer.status, self._clock.now())
        _log.info("agent asked again", pod=pod.name, status=answer.status)

    async def _call(
        self, namespace: str, action: CallRecycle | CallRestart, step: ActionStep
    ) -> None:
        await self._live.ensure_open(namespace, action.restart_name)
        await self._ensure_staying(namespace, action.pod)
        path = "/recycle" if step is ActionStep.RECYCLE else "/restart"
        request = RestartRequest(
            restart_id=action.restart_id, drain_timeout_seconds=action.drain_timeout_seconds
        )
        answer = await self._agents.call(
            _address(action.pod), "POST", path, msgspec.to_builtins(request)
        )
        self._facts.record_call(
            action.pod.uid,
            CallAnswer(
                restart_id=action.restart_id,
                step=step,
                at=self._clock.now(),
                status=answer.status,
                message=answer.message,
            ),
        )
        _log.info(
            "agent called",
            path=path,
            pod=action.pod.name,
            id=action.restart_id,
            status=answer.status,
        )

    async def _ensure_staying(self, namespace: str, pod: Pod) -> Object:
        """Return the pod as it is now. Raises StaleError if it is another, or on its way out."""
        live = await self._live.pod(namespace, pod)
        if live["metadata"].get("deletionTimestamp"):
            raise StaleError(f"pod {pod.name} is being deleted")
        return live

    async def _dry_run(self, namespace: str, pod: Pod) -> EvictionAnswer:
        live = await self._live.pod(namespace, pod)
        answer = await eviction.ask(self._api, self._clock, live, dry_run=True)
        self._facts.record_eviction(answer)
        return answer

    async def _evict(self, namespace: str, action: Evict) -> None:
        await self._live.ensure_open(namespace, action.restart_name)
        await self._ensure_staying(namespace, action.pod)
        answer = await self._dry_run(namespace, action.pod)
        if answer.verdict is not EvictionVerdict.ALLOWED:
            return
        live = await self._live.pod(namespace, action.pod)
        answer = await eviction.ask(self._api, self._clock, live, dry_run=False)
        self._facts.record_eviction(answer)
        await self._live.refresh(PODS, live)
        _log.info("pod evicted", pod=action.pod.name, verdict=str(answer.verdict))

    async def _delete_pod(self, namespace: str, action: DeletePod) -> None:
        await self._live.ensure_open(namespace, action.restart_name)
        live = await self._ensure_staying(namespace, action.pod)
        metadata = live["metadata"]
        preconditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        try:
            await self._api.send(Call("DELETE", PODS.path(namespace, action.pod.name), body))
        except ApiError as error:
            if error.is_conflict or error.is_missing:
                raise StaleError(f"pod {action.pod.name} has changed") from error
            raise
        await self._live.refresh(PODS, live)
        _log.info("pod deleted", pod=action.pod.name)


def _address(pod: Pod) -> AgentAddress:
    return AgentAddress(pod.ip, pod.control_port, pod.uid)
