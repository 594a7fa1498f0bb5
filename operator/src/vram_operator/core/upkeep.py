"""Keeping what a workload owns, and what its agents run by, as its spec says.

Why it exists: one place decides what is applied and what is pushed, and both only when it differs.
Called by ``planning``. It decides nothing about restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from vram_agent.protocol import AgentMode

from vram_operator.api import PodTemplate, Reason
from vram_operator.core.plan import Action, EnsureObject, Knock, PushConfig
from vram_operator.core.resources import (
    CONTENT_HASH_ANNOTATION,
    SCALE_FIELD_MANAGER,
    content_hash,
    is_hash_of,
    make_config_map,
    make_deployment,
    make_pushed_config,
    make_scale,
    make_service,
    make_trust_config_map,
)
from vram_operator.core.snapshot import Agent, Pod, PushAnswer, Snapshot, Target
from vram_operator.core.turn import earliest
from vram_operator.core.visit import Visit

PUSH_AGAIN = timedelta(seconds=30)
"""A config that did not arrive is pushed again after this."""
PUSH_REFUSED_AGAIN = timedelta(seconds=300)
"""One that the agent refused, after this: only a new spec can make it acceptable."""
KNOCK_AGAIN = timedelta(seconds=60)
"""An agent that refuses our calls is asked again after this: its key file may be mended."""
OTHERS_MEND_WITHIN = timedelta(seconds=15)
"""A target that is missing or another's is looked at again after this."""
_OTHERS_MEND = frozenset({Reason.TARGET_NOT_FOUND, Reason.MISSING_LABEL, Reason.CONFLICTED})
_REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What to apply and push, and when to look again."""

    actions: tuple[Action, ...]
    calls: tuple[Action, ...] = ()
    """What is sent to agents: whoever waits for their answers does it last."""
    requeue_at: datetime | None = None


def plan_upkeep(visit: Visit) -> Upkeep:
    """Return what to apply and push.

    1. The trust ConfigMap is kept in the namespace of every workload: pods of a target that comes
    later are to find it.
    2. A refused spec changes nothing else, except that one the apiserver refused is tried again.
    What another object is to blame for is looked at again: no watch tells of it.
    3. In template mode so are the ConfigMap, the Service and the Deployment.
    4. Agents that report another generation of the config are sent ours.
    5. Agents that refuse our calls are asked now and then whether they still do.
    """
    trust = tuple(_plan_trust(visit.snapshot))  # 1
    if visit.refusal is not None and visit.refusal.reason is not Reason.INVALID_TEMPLATE:  # 2
        mends_itself = visit.refusal.reason in _OTHERS_MEND
        return Upkeep(trust, requeue_at=visit.now + OTHERS_MEND_WITHIN if mends_itself else None)
    objects = (*trust, *_plan_objects(visit))  # 3
    pushes, again = _plan_pushes(visit)  # 4
    knocks, knock_at = _plan_knocks(visit)  # 5
    return Upkeep(objects, (*pushes, *knocks), earliest([again, knock_at]))


def _plan_trust(snapshot: Snapshot) -> Iterator[EnsureObject]:
    if snapshot.public_keys:
        yield from _unless_there(snapshot, make_trust_config_map(snapshot))


def _plan_objects(visit: Visit) -> Iterator[EnsureObject]:
    snapshot, template = visit.snapshot, visit.snapshot.workload.spec.template
    if template is None:
        return
    workload = snapshot.workload
    yield from _unless_there(snapshot, make_config_map(workload), make_service(workload))
    yield from _plan_deployment(visit, template, snapshot.target)


def _unless_there(snapshot: Snapshot, *manifests: dict[str, Any]) -> Iterator[EnsureObject]:
    for manifest in manifests:
        found = snapshot.find_object(manifest["kind"], manifest["metadata"]["name"])
        if found is None or found.content_hash != content_hash(manifest):
            yield EnsureObject(manifest=manifest)


def _plan_deployment(
    visit: Visit, template: PodTemplate, target: Target | None
) -> Iterator[EnsureObject]:
    workload = visit.snapshot.workload
    applied = None if target is None else target.annotations.get(CONTENT_HASH_ANNOTATION)
    if target is None or not is_hash_of(applied, template):
        image = template.image or visit.snapshot.settings.agent_image
        yield EnsureObject(manifest=make_deployment(workload, template, image))
    if target is not None and target.replicas != template.replicas:
        yield EnsureObject(
            manifest=make_scale(workload, template), field_manager=SCALE_FIELD_MANAGER
        )


def _plan_pushes(visit: Visit) -> tuple[list[PushConfig], datetime | None]:
    workload = visit.snapshot.workload
    if workload.spec.template is None and not workload.spec.models:
        return [], None
    config = make_pushed_config(workload)
    pushes, waits = [], []
    for pod in visit.pods:
        agent = visit.agent_of(pod.uid)
        if not _is_outdated(visit, pod, agent):
            continue
        if agent.refuses:
            continue
        again = _push_again_at(agent.push, workload.generation)
        if again is None or again <= visit.now:
            pushes.append(PushConfig(pod=pod, config=config))
        else:
            waits.append(again)
    return pushes, min(waits, default=None)


def _plan_knocks(visit: Visit) -> tuple[list[Knock], datetime | None]:
    knocks, waits = [], []
    for pod in visit.pods:
        agent = visit.agent_of(pod.uid)
        if not agent.refuses or visit.fresh_report(agent) is None or not pod.control_port:
            continue
        again = None if agent.refused_at is None else agent.refused_at + KNOCK_AGAIN
        if again is None or again <= visit.now:
            knocks.append(Knock(pod=pod))
        else:
            waits.append(again)
    return knocks, earliest(waits)


def _is_outdated(visit: Visit, pod: Pod, agent: Agent) -> bool:
    report = visit.fresh_report(agent)
    return (
        report is not None
        and report.agent.mode is not AgentMode.RUN
        and report.config_generation != visit.snapshot.workload.generation
        and pod.control_port > 0
    )


def _push_again_at(push: PushAnswer | None, generation: int) -> datetime | None:
    """Return when to push again; None for now."""
    if push is None or push.generation != generation or push.status in _REFUSED:
        return None  # one that refuses all our calls is knocked at first
    refused = HTTPStatus.BAD_REQUEST <= push.status < HTTPStatus.INTERNAL_SERVER_ERROR
    return push.at + (PUSH_REFUSED_AGAIN if refused else PUSH_AGAIN)
