"""The cache keeps the newest of each object, whatever order the news comes in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from vram_operator.cache import Cache
from vram_operator.clock import SystemClock
from vram_operator.kube import PODS, RESTARTS, WORKLOADS

KEY = ("models", "speech")


def pod(version: int, uid: str = "u1", ready: str = "True", **changes: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "speech-1",
            "namespace": "models",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {"vram.dev/workload": "speech"},
            "managedFields": [{"big": "x" * 100}],
            **changes,
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "agent", "env": [{"name": "A"}]}]},
        "status": {
            "podIP": "10.0.0.1",
            "qosClass": "BestEffort",
            "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:05Z"}
            ],
        },
    }


@pytest.fixture
def cache() -> Cache:
    return Cache(SystemClock())


def test_a_pod_belongs_to_the_workload_of_its_label(cache: Cache) -> None:
    assert cache.observe(PODS, pod(5)) == KEY
    (kept,) = cache.members(PODS, KEY)
    assert kept["status"]["podIP"] == "10.0.0.1"
    assert cache.members(PODS, ("models", "other")) == []


def test_a_pod_is_cut_down_to_what_is_read(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    (kept,) = cache.members(PODS, KEY)
    assert "managedFields" not in kept["metadata"]
    assert kept["spec"]["containers"] == [{"name": "agent", "ports": []}]
    assert "qosClass" not in kept["status"]


@pytest.mark.parametrize("version", [4, 5])
def test_older_and_equal_news_change_nothing(cache: Cache, version: int) -> None:
    cache.observe(PODS, pod(5))
    assert cache.observe(PODS, pod(version, labels={})) is None
    assert len(cache.members(PODS, KEY)) == 1


def test_a_deleted_object_does_not_come_back_with_late_news(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    assert cache.observe_deletion(PODS, pod(7)) == KEY
    assert cache.observe(PODS, pod(6)) is None
    assert cache.members(PODS, KEY) == []


def test_a_successor_of_the_same_name_is_another_object(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    cache.observe(PODS, pod(9, uid="u2"))
    cache.observe_deletion(PODS, pod(8))
    (kept,) = cache.members(PODS, KEY)
    assert kept["metadata"]["uid"] == "u2"


def test_an_object_can_move_to_another_workload(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    assert cache.observe(PODS, pod(6, labels={"vram.dev/workload": "other"})) == ("models", "other")
    assert cache.members(PODS, KEY) == []


def test_a_list_removes_what_is_gone_and_keeps_what_is_newer(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    newer = pod(50, uid="u2", name="speech-2")
    cache.observe(PODS, newer)
    assert cache.replace_all(PODS, None, [], version=20) == {KEY}
    (kept,) = cache.members(PODS, KEY)
    assert kept["metadata"]["uid"] == "u2"


def test_the_list_of_one_namespace_says_nothing_of_another(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    assert cache.replace_all(PODS, "elsewhere", [], version=20) == set()
    assert len(cache.members(PODS, KEY)) == 1


def test_restarts_and_workloads_have_their_keys(cache: Cache) -> None:
    metadata = {"namespace": "models", "uid": "x", "resourceVersion": "1"}
    restart = {"metadata": {"name": "r", **metadata}, "spec": {"workload": "speech"}}
    assert cache.observe(RESTARTS, restart) == KEY
    found = {"metadata": {"name": "speech", **metadata, "uid": "y"}, "spec": {}}
    assert cache.observe(WORKLOADS, found) == KEY
    assert cache.find(WORKLOADS, *KEY) is not None


def test_when_a_pod_turned_not_ready_is_remembered_after_it_is_ready_again(cache: Cache) -> None:
    cache.observe(PODS, pod(5))
    assert cache.unready_since("u1") is None
    cache.observe(PODS, pod(6, ready="False"))
    cache.observe(PODS, pod(7))
    assert cache.unready_since("u1") == datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC)
    cache.observe_deletion(PODS, pod(8))
    assert cache.unready_since("u1") is None
