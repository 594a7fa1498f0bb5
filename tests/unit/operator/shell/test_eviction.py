"""Answers of the Eviction API, as measured on Kubernetes 1.34, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest
from vram_operator.core.snapshot import EvictionVerdict
from vram_operator.eviction import verdict_of
from vram_operator.kube import ApiError

BLOCKED = {
    "reason": "TooManyRequests",
    "message": "Cannot evict pod as it would violate the pod's disruption budget.",
    "details": {
        "causes": [
            {
                "reason": "DisruptionBudget",
                "message": "The disruption budget d1 needs 1 healthy pods and has 1 currently",
            }
        ]
    },
}
UNOBSERVED = {
    "reason": "TooManyRequests",
    "details": {
        "retryAfterSeconds": 10,
        "causes": [
            {
                "reason": "DisruptionBudget",
                "message": "The disruption budget d1 is still being processed by the server.",
            }
        ],
    },
}
SEVERAL = {
    "message": "This pod has more than one PodDisruptionBudget, which the eviction subresource "
    "does not support."
}


@pytest.mark.parametrize(
    ("status", "body", "verdict", "blocker"),
    [
        pytest.param(429, BLOCKED, EvictionVerdict.BLOCKED, "d1", id="a budget blocks"),
        pytest.param(429, UNOBSERVED, EvictionVerdict.BLOCKED, "d1", id="a budget is new"),
        pytest.param(429, {}, EvictionVerdict.FAILED, "", id="plain throttling is no budget"),
        pytest.param(
            500, SEVERAL, EvictionVerdict.BLOCKED, "more than one PodDisruptionBudget", id="two"
        ),
        pytest.param(500, {}, EvictionVerdict.FAILED, "", id="a broken apiserver"),
        pytest.param(409, {}, EvictionVerdict.CONFLICT, "", id="another pod by now"),
        pytest.param(404, {}, EvictionVerdict.GONE, "", id="no pod any more"),
        pytest.param(403, {}, EvictionVerdict.FAILED, "", id="not allowed to evict"),
    ],
)
def test_what_an_answer_means(
    status: int, body: dict[str, Any], verdict: EvictionVerdict, blocker: str
) -> None:
    assert verdict_of(ApiError("POST eviction", status, body)) == (verdict, blocker)


def test_the_delay_that_the_server_asks_for_is_kept() -> None:
    assert ApiError("POST eviction", 429, UNOBSERVED).after_seconds == 10
