"""A restart by name is about the pod that bore it when the restart was first seen."""

from __future__ import annotations

from typing import Any

from vram_operator.cache import Cache
from vram_operator.core.snapshot import Restart
from vram_operator.facts import Facts
from vram_operator.gather import Gatherer
from vram_operator.kube import PODS, RESTARTS, WORKLOADS

from tests.support.clocks import StoppedClock
from tests.support.factories import NOW, make_settings, rfc3339

KEY = ("lab", "speech")


class EmptyApiserver:
    async def find(self, _: str) -> None:
        return None


def raw(name: str, uid: str, version: int, **content: Any) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": "lab",
        "uid": uid,
        "resourceVersion": str(version),
        "creationTimestamp": rfc3339(NOW),
        "labels": {"vram.dev/workload": "speech"},
    }
    return {"metadata": metadata, **content}


def raw_pod(uid: str, version: int) -> dict[str, Any]:
    return raw("speech-0", uid, version, spec={"containers": []}, status={"phase": "Running"})


async def test_a_replacement_of_the_same_name_and_second_is_another_pod() -> None:
    cache, api = Cache(StoppedClock()), EmptyApiserver()
    target = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "speech"}
    cache.observe(WORKLOADS, raw("speech", "w", 1, spec={"targetRef": target}))
    by_hand = {"workload": "speech", "pod": {"name": "speech-0"}}
    cache.observe(RESTARTS, raw("by-hand", "r", 2, spec=by_hand))
    apiserver: Any = api
    gatherer = Gatherer(apiserver, cache, Facts(), StoppedClock(), make_settings())

    async def gathered() -> Restart:
        snapshot = await gatherer.gather(KEY)
        assert snapshot is not None
        (restart,) = snapshot.restarts
        return restart

    assert (await gathered()).spec.pod.uid == ""
    cache.observe(PODS, raw_pod("first", 3))
    assert (await gathered()).spec.pod.uid == "first"
    cache.observe_deletion(PODS, raw_pod("first", 4))
    cache.observe(PODS, raw_pod("second", 5))
    assert (await gathered()).spec.pod.uid == "first"
    cache.observe(RESTARTS, raw("by-hand", "r", 6, spec=by_hand, status={"outcome": "Recovered"}))
    assert (await gathered()).spec.pod.uid == ""
