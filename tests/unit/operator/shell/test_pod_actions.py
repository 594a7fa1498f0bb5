"""What is about to be acted on is read live first; what changed meanwhile is not acted on."""

from __future__ import annotations

from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import pytest
from vram_agent.protocol import AgentConfig, ConfigMetadata
from vram_operator.agent_client import AgentAddress, Answer
from vram_operator.cache import Cache
from vram_operator.clock import SystemClock
from vram_operator.core.plan import CallRecycle, CallRestart, DeletePod, DryRunEvict, Evict, Knock
from vram_operator.core.plan import PushConfig as Push
from vram_operator.core.snapshot import EvictionVerdict, Pod
from vram_operator.facts import Facts
from vram_operator.kube import PODS, RESTARTS, ApiError
from vram_operator.live import Live, StaleError
from vram_operator.pod_actions import PodActions

NAMESPACE = "models"
POD = Pod(
    name="speech-1",
    uid="u1",
    resource_version="5",
    created=datetime(2026, 1, 1, tzinfo=UTC),
    ip="10.0.0.1",
    control_port=8001,
)
RESTART = {
    "metadata": {"name": "r1", "namespace": NAMESPACE, "uid": "ru", "resourceVersion": "7"},
    "spec": {"workload": "speech", "pod": {"name": "speech-1"}},
}


def raw_pod(version: int = 5, uid: str = "u1", **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "speech-1",
            "namespace": NAMESPACE,
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {"vram.dev/workload": "speech"},
            **metadata,
        }
    }


class Apiserver:
    """Objects by path, and a script of answers to evictions."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {
            PODS.path(NAMESPACE, "speech-1"): raw_pod(),
            RESTARTS.path(NAMESPACE, "r1"): deepcopy(RESTART),
        }
        self.refusal: ApiError | None = None
        self.evictions: list[dict[str, Any]] = []
        self.deletions: list[dict[str, Any]] = []

    async def find(self, path: str) -> dict[str, Any] | None:
        return self.objects.get(path)

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path.endswith("/pods/speech-1/eviction")
        self.evictions.append(body["deleteOptions"])
        if self.refusal is not None:
            raise self.refusal
        return {}

    async def send(self, call: Any) -> dict[str, Any]:
        assert call.method == "DELETE"
        self.deletions.append(call.body["preconditions"])
        return {}


class Agents:
    """Records the calls."""

    def __init__(self, status: int = 202) -> None:
        self.status = status
        self.calls: list[tuple[str, str, Any]] = []

    async def call(self, agent: AgentAddress, method: str, path: str, body: Any) -> Answer:
        assert agent == AgentAddress("10.0.0.1", 8001, "u1")
        self.calls.append((method, path, body))
        return Answer(self.status, "said")


class Bench:
    """The actions with everything around them faked."""

    def __init__(self) -> None:
        self.server = Apiserver()
        self.agents = Agents()
        self.facts = Facts()
        self.cache = Cache(SystemClock())
        self.cache.observe(PODS, raw_pod())
        self.cache.observe(RESTARTS, deepcopy(RESTART))
        live = Live(self.server, self.cache)  # type: ignore[arg-type]
        self.actions = PodActions(
            self.server,  # type: ignore[arg-type]
            live,
            self.agents,  # type: ignore[arg-type]
            self.facts,
            SystemClock(),
        )

    def change(self, path: str, version: int) -> None:
        self.server.objects[path]["metadata"]["resourceVersion"] = str(version)


@pytest.fixture
def bench() -> Bench:
    return Bench()


CALL = CallRestart(pod=POD, restart_name="r1", restart_id="r1.inplace", drain_timeout_seconds=30)
EVICT = Evict(pod=POD, restart_name="r1")
DELETE = DeletePod(pod=POD, restart_name="r1")
ACTING = pytest.mark.parametrize("action", [CALL, EVICT, DELETE], ids=["call", "evict", "delete"])


def acted(bench: Bench) -> bool:
    real = [one for one in bench.server.evictions if "dryRun" not in one]
    return bool(bench.agents.calls or real or bench.server.deletions)


async def test_a_restart_is_asked_for_with_its_id_and_the_answer_is_kept(bench: Bench) -> None:
    await bench.actions.carry_out(NAMESPACE, CALL)
    body = {"restartID": "r1.inplace", "drainTimeoutSeconds": 30}
    assert bench.agents.calls == [("POST", "/restart", body)]
    (answer,) = bench.facts.agent("u1").calls
    assert (answer.restart_id, answer.status, answer.message) == ("r1.inplace", 202, "said")


async def test_a_recycle_goes_to_its_own_path(bench: Bench) -> None:
    action = CallRecycle(pod=POD, restart_name="r1", restart_id="x", drain_timeout_seconds=0)
    await bench.actions.carry_out(NAMESPACE, action)
    assert bench.agents.calls[0][1] == "/recycle"


@ACTING
async def test_a_restart_that_was_changed_by_another_is_not_acted_on(
    bench: Bench, action: Any
) -> None:
    bench.change(RESTARTS.path(NAMESPACE, "r1"), 8)
    with pytest.raises(StaleError, match="r1 has changed"):
        await bench.actions.carry_out(NAMESPACE, action)
    assert not acted(bench)
    # The next plan rests on what was read.
    (known,) = bench.cache.members(RESTARTS, (NAMESPACE, "speech"))
    assert known["metadata"]["resourceVersion"] == "8"


@ACTING
async def test_a_restart_that_is_gone_is_not_acted_on(bench: Bench, action: Any) -> None:
    del bench.server.objects[RESTARTS.path(NAMESPACE, "r1")]
    with pytest.raises(StaleError, match="r1 has changed"):
        await bench.actions.carry_out(NAMESPACE, action)
    assert not acted(bench)


@ACTING
async def test_another_pod_of_the_same_name_is_not_acted_on(bench: Bench, action: Any) -> None:
    bench.server.objects[PODS.path(NAMESPACE, "speech-1")] = raw_pod(9, uid="u2")
    with pytest.raises(StaleError, match="speech-1 with uid u1 is gone"):
        await bench.actions.carry_out(NAMESPACE, action)
    assert not acted(bench)


@ACTING
async def test_a_pod_on_its_way_out_is_left_alone(bench: Bench, action: Any) -> None:
    deleted = raw_pod(6, deletionTimestamp="2026-01-01T00:00:00Z")
    bench.server.objects[PODS.path(NAMESPACE, "speech-1")] = deleted
    with pytest.raises(StaleError, match="is being deleted"):
        await bench.actions.carry_out(NAMESPACE, action)
    assert not acted(bench)


async def test_an_eviction_goes_by_what_is_live_and_after_a_dry_run(bench: Bench) -> None:
    bench.change(PODS.path(NAMESPACE, "speech-1"), 6)
    await bench.actions.carry_out(NAMESPACE, EVICT)
    preconditions = {"uid": "u1", "resourceVersion": "6"}
    assert bench.server.evictions == [
        {"preconditions": preconditions, "dryRun": ["All"]},
        {"preconditions": preconditions},
    ]
    answer = bench.facts.eviction("u1")
    assert answer is not None
    assert (answer.verdict, answer.dry_run) == (EvictionVerdict.ALLOWED, False)


async def test_a_dry_run_that_is_refused_spends_nothing(bench: Bench) -> None:
    bench.server.refusal = ApiError("POST", 409, {"reason": "Conflict"})
    await bench.actions.carry_out(NAMESPACE, EVICT)
    assert [one.get("dryRun") for one in bench.server.evictions] == [["All"]]
    answer = bench.facts.eviction("u1")
    assert answer is not None
    assert (answer.verdict, answer.dry_run) == (EvictionVerdict.CONFLICT, True)


async def test_a_dry_run_alone_never_evicts(bench: Bench) -> None:
    await bench.actions.carry_out(NAMESPACE, DryRunEvict(pod=POD))
    assert [one.get("dryRun") for one in bench.server.evictions] == [["All"]]


async def test_a_deletion_names_what_it_means(bench: Bench) -> None:
    await bench.actions.carry_out(NAMESPACE, DELETE)
    assert bench.server.deletions == [{"uid": "u1", "resourceVersion": "5"}]


@pytest.mark.parametrize(("status", "refuses"), [(200, False), (401, True), (403, True)])
async def test_an_agent_that_refuses_calls_is_known_to(
    bench: Bench, status: int, refuses: bool
) -> None:
    bench.agents.status = status
    config = AgentConfig(metadata=ConfigMetadata(generation=3))
    await bench.actions.carry_out(NAMESPACE, Push(pod=POD, config=config))
    method, path, body = bench.agents.calls[0]
    assert (method, path) == ("PUT", "/config")
    assert (body["apiVersion"], body["kind"]) == ("vram.dev/v1alpha1", "AgentConfig")
    agent = bench.facts.agent("u1")
    assert agent.push is not None
    assert (agent.push.generation, agent.push.status, agent.refuses) == (3, status, refuses)


async def test_no_answer_does_not_unmake_a_refusal(bench: Bench) -> None:
    for status in (401, 0):
        bench.agents.status = status
        await bench.actions.carry_out(NAMESPACE, CALL)
    assert bench.facts.agent("u1").refuses


async def test_an_agent_whose_key_was_mended_is_found_out_by_a_call_that_does_nothing(
    bench: Bench,
) -> None:
    bench.agents.status = 401
    await bench.actions.carry_out(NAMESPACE, CALL)
    refused = bench.facts.agent("u1")
    assert refused.refuses
    assert refused.refused_at is not None
    bench.agents.status = 404
    await bench.actions.carry_out(NAMESPACE, Knock(pod=POD))
    assert bench.agents.calls[-1][:2] == ("POST", "/models/-/unload")
    mended = bench.facts.agent("u1")
    assert (mended.refuses, mended.refused_at) == (False, None)


async def test_a_pod_that_no_watch_has_shown_is_not_taken_for_gone() -> None:
    bench = Bench()
    bench.server.objects[PODS.path(NAMESPACE, "speech-2")] = raw_pod(name="speech-2", uid="u2")
    live = Live(bench.server, bench.cache)  # type: ignore[arg-type]
    with pytest.raises(StaleError, match="speech-2"):
        await live.ensure_no_news(NAMESPACE, "speech-2")
    # The next plan knows it; what it decides then is not held up again.
    assert bench.cache.find(PODS, NAMESPACE, "speech-2") is not None
    await live.ensure_no_news(NAMESPACE, "speech-2")


async def test_a_pod_that_is_gone_is_no_news() -> None:
    bench = Bench()
    live = Live(bench.server, bench.cache)  # type: ignore[arg-type]
    await live.ensure_no_news(NAMESPACE, "speech-1")
    del bench.server.objects[PODS.path(NAMESPACE, "speech-1")]
    await live.ensure_no_news(NAMESPACE, "speech-1")
