"""Reads pods, targets and restarts from the apiserver's JSON into the types of the plan.

Called by `gather`, `apply`, `poller` and `gauges`. Pure: JSON in, frozen values out.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from vram_agent.protocol import CONTROL_PORT_ANNOTATION, InvalidQuantityError, parse_quantity

from vram_operator.api import (
    AGENT_CONTAINER,
    RestartSpec,
    RestartStatus,
    WorkloadSpec,
    WorkloadStatus,
    decode,
)
from vram_operator.cache import ready_condition
from vram_operator.clock import parse_time
from vram_operator.core.snapshot import FINISHED_PHASES, Pod, Restart, Target, Workload
from vram_operator.kube import Object

CONTENT_HASH_ANNOTATION = "vram.dev/content-hash"
CONTROL_PORT_NAME = "control"


class InvalidObjectError(ValueError):
    """An object passed the CRD's schema and still cannot be read; the message has the field."""


def control_port(pod: Object) -> int:
    """Return the agent's control port: the one named so, else the annotation's, else 0."""
    for container in (pod.get("spec") or {}).get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == CONTROL_PORT_NAME:
                return int(port["containerPort"])
    text = (pod["metadata"].get("annotations") or {}).get(CONTROL_PORT_ANNOTATION, "")
    return int(text) if text.isdecimal() and int(text) < 65_536 else 0


def read_pod(raw: Object, unready_since: datetime | None) -> Pod:
    """Return what the plan knows of a pod."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    ready = ready_condition(raw) or {}
    agent = _agent_status(raw)
    last = agent.get("lastState") or {}
    owner = owner_of(metadata)
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        created=parse_time(metadata["creationTimestamp"]),
        ip=status.get("podIP", ""),
        node=(raw.get("spec") or {}).get("nodeName", ""),
        phase=status.get("phase", "Pending"),
        ready=ready.get("status") == "True",
        ready_changed_at=_time(ready.get("lastTransitionTime")),
        unready_since=unready_since,
        terminating="deletionTimestamp" in metadata,
        agent_running_since=_running_since(raw, agent),
        agent_finished_at=_time((last.get("terminated") or {}).get("finishedAt")),
        restart_count=int(agent.get("restartCount", 0)),
        control_port=control_port(raw),
        owner_kind=owner.get("kind", ""),
        owner_name=owner.get("name", ""),
        labels=metadata.get("labels") or {},
    )


def _agent_status(raw: Object) -> Mapping[str, Any]:
    """Return the status of the agent's container.

    It is the one named ``agent``, else the one with the port named ``control``, else the first.
    """
    containers = (raw.get("spec") or {}).get("containers") or []
    names = [container["name"] for container in containers]
    with_port = [
        container["name"]
        for container in containers
        if any(port.get("name") == CONTROL_PORT_NAME for port in container.get("ports") or [])
    ]
    wanted = AGENT_CONTAINER if AGENT_CONTAINER in names else next(iter(with_port + names), "")
    statuses = (raw.get("status") or {}).get("containerStatuses") or []
    return next((status for status in statuses if status["name"] == wanted), {})


def _running_since(pod: Object, agent: Mapping[str, Any]) -> datetime | None:
    """Return since when the agent's container runs, None while it does not.

    1. Its own status says so. 2. Its status says otherwise. 3. There is none, as where a virtual
    kubelet runs the pod: a pod that runs is taken at its word.
    """
    status = pod.get("status") or {}
    running = (agent.get("state") or {}).get("running")
    if running is not None and running.get("startedAt"):  # 1
        return _time(running["startedAt"])
    if running is None and agent:  # 2
        return None
    if status.get("phase") != "Running":
        return None
    return parse_time(status.get("startTime") or pod["metadata"]["creationTimestamp"])  # 3


def is_finished_pod(pod: Object) -> bool:
    """Has the pod ended, and only waits for its removal?"""
    return (pod.get("status") or {}).get("phase") in FINISHED_PHASES


def owner_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the owner reference of the controller, else the first, else nothing."""
    owners = metadata.get("ownerReferences") or []
    return next((one for one in owners if one.get("controller")), owners[0] if owners else {})


def read_target(raw: Object) -> Target:
    """Return what the plan knows of a Deployment or StatefulSet."""
    metadata, spec, status = raw["metadata"], raw["spec"], raw.get("status") or {}
    return Target(
        kind=raw["kind"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 0)),
        observed_generation=int(status.get("observedGeneration", 0)),
        replicas=int(spec.get("replicas", 1)),
        current=int(status.get("replicas", 0)),
        updated=int(status.get("updatedReplicas", 0)),
        available=int(status.get("availableReplicas", 0)),
        to_update=_to_update(raw["kind"], spec),
        paused=bool(spec.get("paused", False)),
        selector=_selector(spec.get("selector") or {}),
        owner_uid=owner_of(metadata).get("uid", ""),
        owner_kind=owner_of(metadata).get("kind", ""),
        owner_name=owner_of(metadata).get("name", ""),
        annotations=metadata.get("annotations") or {},
        template_labels=(spec["template"].get("metadata") or {}).get("labels") or {},
    )


def _to_update(kind: str, spec: Mapping[str, Any]) -> int | None:
    """Return how many pods a StatefulSet updates by itself; None for all, as a Deployment does."""
    strategy = spec.get("updateStrategy") or {}
    if kind != "StatefulSet":
        return None
    if strategy.get("type") == "OnDelete":
        return 0
    partition = int((strategy.get("rollingUpdate") or {}).get("partition") or 0)
    return max(0, int(spec.get("replicas", 1)) - partition)


def _selector(selector: Mapping[str, Any]) -> str:
    """Return a label selector as text, as the scale subresource has it."""
    parts = [f"{k}={v}" for k, v in sorted((selector.get("matchLabels") or {}).items())]
    for one in selector.get("matchExpressions") or []:
        values = ",".join(one.get("values") or [])
        parts.append(
            {
                "In": f"{one['key']} in ({values})",
                "NotIn": f"{one['key']} notin ({values})",
                "Exists": one["key"],
                "DoesNotExist": f"!{one['key']}",
            }[one["operator"]]
        )
    return ",".join(parts)


def read_workload(raw: Object) -> Workload:
    """Return a GPUModelWorkload. Raises InvalidObjectError."""
    metadata = raw["metadata"]
    try:
        spec = decode(raw.get("spec") or {}, WorkloadSpec)
    except msgspec.ValidationError as error:
        raise InvalidObjectError(f"spec: {error}") from error
    return Workload(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 0)),
        resource_version=metadata["resourceVersion"],
        created=parse_time(metadata["creationTimestamp"]),
        spec=spec,
        status=read_workload_status(raw),
        annotations=metadata.get("annotations") or {},
    )


def read_workload_status(raw: Object) -> WorkloadStatus:
    """Return the status; an empty one where somebody wrote what cannot be read."""
    try:
        return decode(raw.get("status") or {}, WorkloadStatus)
    except msgspec.ValidationError:
        return WorkloadStatus()


def read_restart(raw: Object) -> Restart:
    """Return a GPUPodRestart. Raises InvalidObjectError."""
    metadata = raw["metadata"]
    try:
        spec = decode(raw["spec"], RestartSpec)
        status = decode(raw.get("status") or {}, RestartStatus)
    except msgspec.ValidationError as error:
        raise InvalidObjectError(f"GPUPodRestart {metadata['name']}: {error}") from error
    return Restart(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        created=parse_time(metadata["creationTimestamp"]),
        spec=spec,
        status=status,
        generation=int(metadata.get("generation", 1)),
        annotations=metadata.get("annotations") or {},
        labels=metadata.get("labels") or {},
    )


def raw_residual_policy(workload: Object) -> Object:
    """Return ``spec.restart.residual`` as it stands; empty where there is none."""
    policy = ((workload.get("spec") or {}).get("restart") or {}).get("residual") or {}
    return dict(policy)


def threshold_bytes(workload: Object) -> int | None:
    """Return the residual threshold; None where there is none that can be read."""
    try:
        return parse_quantity(str(raw_residual_policy(workload)["threshold"]))
    except (KeyError, InvalidQuantityError):
        return None


def _time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None
