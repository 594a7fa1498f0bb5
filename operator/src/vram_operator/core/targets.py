"""The Deployment or StatefulSet behind a workload: which pods are its own, and is it rolling out.

Why it exists: a label alone says little, since people copy manifests; and what is rolled out by
itself depends on the kind and its strategy. Called by ``visit`` and ``admission``. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from vram_operator.core.snapshot import Pod, Target

_MAKERS: Mapping[str, str] = {"Deployment": "ReplicaSet", "StatefulSet": "StatefulSet"}
"""Kind of target → kind of the controller of its pods."""
_TEMPLATE_HASH_LABEL = "pod-template-hash"


def is_of_another(pod: Pod, target: Target) -> bool:
    """Does a controller that is not the target's own run the pod?

    Only what is certain counts: a pod without a controller is taken at its label's word, and so is
    one whose ReplicaSet has a name that no Deployment gave it.
    """
    if not pod.owner_kind:
        return False
    if pod.owner_kind != _MAKERS.get(target.kind, pod.owner_kind):
        return True
    if target.kind == "StatefulSet":
        return pod.owner_name != target.name
    maker, _, template_hash = pod.owner_name.rpartition("-")
    is_named_by_deployment = bool(maker) and template_hash == pod.labels.get(_TEMPLATE_HASH_LABEL)
    # A Deployment's name that is too long is cut in the name of its ReplicaSets.
    return is_named_by_deployment and not target.name.startswith(maker)


def is_rolling_out(target: Target) -> bool:
    """Is the target on its way to another generation of its pods, by itself or paused?

    What its strategy leaves to others (a StatefulSet's ``partition``, ``OnDelete``) is not waited
    for: it may stay so for ever.
    """
    wanted = target.replicas if target.to_update is None else target.to_update
    return (
        target.observed_generation < target.generation
        or target.updated < min(wanted, target.current)
        or target.current > target.replicas
    )


def say_rollout(target: Target) -> str:
    """Say what a target that is rolling out does, and what to do about it."""
    if target.paused:
        return (
            f"{target.kind} {target.name} is paused within a rollout; "
            f"kubectl rollout resume {target.kind.lower()}/{target.name} lets it go on"
        )
    return f"{target.kind} {target.name} is rolling out"
