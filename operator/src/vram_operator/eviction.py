"""Asks the Eviction API, and reads its answers.

Called by `apply`. A real eviction that fails its precondition still spends the budget for 120 s, so
the pod is read live first and a dry run with the same preconditions goes ahead of the real call.
What each answer means was measured on Kubernetes 1.34; a 429 may also be plain throttling.
"""

from __future__ import annotations

import re

from vram_operator.clock import Clock
from vram_operator.core.snapshot import EvictionAnswer, EvictionVerdict
from vram_operator.kube import PODS, Api, ApiError, Object

SEVERAL_BUDGETS = "more than one PodDisruptionBudget"
_BUDGET = re.compile(r"disruption budget (\S+)")


def verdict_of(error: ApiError) -> tuple[EvictionVerdict, str]:
    """Return what a refusal means, and the budget that it names.

    1. 429 with the cause DisruptionBudget: blocked by it.
    2. 500 since two budgets match: blocked, and no waiting helps.
    3. 409: the pod is not the one that was meant any more. 4. 404: it is gone.
    5. Anything else, throttling included: nothing is known.
    """
    if error.status == 429:
        causes = [cause for cause in error.causes if cause.get("reason") == "DisruptionBudget"]
        if causes:  # 1
            found = _BUDGET.search(str(causes[0].get("message", "")))
            return EvictionVerdict.BLOCKED, found[1] if found else ""
    if error.status == 500 and SEVERAL_BUDGETS in error.message:  # 2
        return EvictionVerdict.BLOCKED, SEVERAL_BUDGETS
    if error.is_conflict:  # 3
        return EvictionVerdict.CONFLICT, ""
    if error.is_missing:  # 4
        return EvictionVerdict.GONE, ""
    return EvictionVerdict.FAILED, ""  # 5


async def ask(api: Api, clock: Clock, pod: Object, *, dry_run: bool) -> EvictionAnswer:
    """Evict the pod as it was just read, or ask whether that were allowed.

    Raises ApiUnavailableError when nobody answers.
    """
    metadata = pod["metadata"]
    options: Object = {
        "preconditions": {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    }
    if dry_run:
        options["dryRun"] = ["All"]
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "deleteOptions": options,
    }
    verdict, blocker, message = EvictionVerdict.ALLOWED, "", ""
    try:
        await api.create(PODS.path(metadata["namespace"], metadata["name"], "eviction"), body)
    except ApiError as error:
        verdict, blocker = verdict_of(error)
        causes = "; ".join(str(cause.get("message", "")) for cause in error.causes)
        message = f"{error.message} {causes}".strip()
    return EvictionAnswer(
        pod_uid=metadata["uid"],
        at=clock.now(),
        verdict=verdict,
        dry_run=dry_run,
        blocker=blocker,
        message=message,
    )
