"""``vram-operator explain`` against an apiserver of its own: what it reads, how, and what it says
when it cannot."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import Configuration
from vram_agent.protocol import PodIdentity, Report
from vram_operator import cli
from vram_operator.clock import SystemClock
from vram_operator.explain import ExplainError, Question, answer
from vram_operator.kube import Connection
from vram_operator.settings import Settings

from tests.support.agents import GIB, FakeAgent, Script
from tests.support.factories import make_pod, make_report

KEY = ("lab", "speech")
TARGET = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "step-audio"}
LABELS = {"vram.dev/workload": "speech"}


def metadata(name: str, version: int, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": "lab",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        **fields,
    }


def workload(**restart: Any) -> dict[str, Any]:
    return {"metadata": metadata("speech", 1), "spec": {"targetRef": TARGET, "restart": restart}}


def deployment() -> dict[str, Any]:
    return {
        "metadata": metadata("step-audio", 2),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": LABELS},
            "template": {"metadata": {"labels": LABELS}, "spec": {}},
        },
        "status": {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1},
    }


def pod(ip: str) -> dict[str, Any]:
    ports = [{"name": "control", "containerPort": 8001}]
    running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    return {
        "metadata": metadata("speech-a", 3, labels=LABELS),
        "spec": {"nodeName": "node-1", "containers": [{"name": "model", "ports": ports}]},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "model", "state": running}],
        },
    }


@dataclass
class Apiserver:
    """Answers reads from ``objects`` by plural; ``forbidden`` paths with 403."""

    objects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    report: Report | None = None
    """What the proxy to the agent answers."""
    has_crds: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        path = request.path
        self.asked.append((request.method, path))
        if path in self.forbidden:
            message = f"cannot list {path.rsplit('/', 1)[1]} at the cluster scope"
            return web.json_response({"reason": "Forbidden", "message": message}, status=403)
        if path == "/apis/vram.dev/v1alpha1" and self.has_crds:
            names = ("gpumodelworkloads", "gpupodrestarts")
            return web.json_response({"resources": [{"name": name} for name in names]})
        if path.endswith("/proxy/report") and self.report is not None:
            return web.Response(body=msgspec.json.encode(self.report))
        found = self.find(*path.strip("/").split("/")[-2:])
        if found is None:
            return web.json_response({"message": f"{path} not found"}, status=404)
        return web.json_response(found)

    def find(self, plural: str, name: str) -> dict[str, Any] | None:
        """A list, where the last part of a path is a plural; else an object of that name."""
        if name in self.objects:
            return {"items": self.objects[name], "metadata": {"resourceVersion": "9"}}
        found = self.objects.get(plural, [])
        return next((one for one in found if one["metadata"]["name"] == name), None)


@pytest.fixture
async def apiserver() -> AsyncIterator[tuple[Apiserver, Connection]]:
    kinds = ("gpumodelworkloads", "gpupodrestarts", "pods", "deployments", "statefulsets")
    fake = Apiserver({kind: [] for kind in (*kinds, "services", "configmaps")})
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    async with TestServer(app) as server:
        configuration = Configuration(host=str(server.make_url("")))
        yield fake, Connection(configuration, "vram-system")


Served = tuple[Apiserver, Connection]


async def explained(served: Served, listen_seconds: float = 0.0) -> str:
    settings = Settings(poll_interval_seconds=0.2)
    return await answer(served[1], settings, Question(KEY, listen_seconds), SystemClock())


async def test_a_report_that_cannot_be_had_directly_comes_through_the_apiserver(
    apiserver: Served,
) -> None:
    fake, _ = apiserver
    fake.objects["gpumodelworkloads"] = [workload(residual={"threshold": "8Gi"})]
    fake.objects["deployments"] = [deployment()]
    fake.objects["pods"] = [pod("127.255.0.1")]  # nobody listens there
    fake.report = make_report(make_pod("speech-a"), 5.0)
    text = await explained(apiserver)
    assert "residual 5Gi (source Exclusive, quiet)" in text
    assert "nothing is restarted: speech-a: BelowThreshold" in text
    assert ("GET", "/api/v1/namespaces/lab/pods/speech-a:8001/proxy/report") in fake.asked
    assert {method for method, _ in fake.asked} == {"GET"}


async def test_an_agent_that_nobody_reaches_is_told_with_both_reasons(apiserver: Served) -> None:
    fake, _ = apiserver
    fake.objects["gpumodelworkloads"] = [workload(residual={"threshold": "8Gi"})]
    fake.objects["deployments"] = [deployment()]
    fake.objects["pods"] = [pod("127.255.0.1")]
    text = await explained(apiserver)
    assert "agent     no report: http://127.255.0.1:8001 does not answer" in text
    assert "and through the apiserver: GET /api/v1/namespaces/lab/pods/speech-a:8001" in text
    assert "proxy/report not found" in text


async def test_an_agent_is_asked_directly_where_it_can_be_and_listened_to_for_evidence(
    apiserver: Served,
) -> None:
    fake, _ = apiserver
    identity = PodIdentity(namespace="lab", name="speech-a", uid="uid-speech-a")
    agent = FakeAgent(identity, str, Script(residual_bytes=9 * GIB))
    host = "127.255.0.2"
    await agent.start(host, 8001)
    try:
        residual = {"threshold": "8Gi", "forSeconds": 1, "minSamples": 3}
        fake.objects["gpumodelworkloads"] = [workload(residual=residual)]
        fake.objects["deployments"] = [deployment()]
        fake.objects["pods"] = [pod(host)]
        once = await explained(apiserver)
        assert "TooFewSamples" in once
        assert "--listen 11 waits for that" in once
        text = await explained(apiserver, 1.5)
    finally:
        await agent.stop()
    assert "restarts are decided now: speech-a" in text
    assert "evidence  Sufficient: residual 9Gi above 8Gi" in text
    assert not [path for _, path in fake.asked if "proxy" in path]
    assert {method for method, _ in fake.asked} == {"GET"}
    assert agent.executed == []


async def test_who_may_read_one_namespace_only_is_told_what_that_leaves_out(
    apiserver: Served,
) -> None:
    fake, _ = apiserver
    fake.objects["gpumodelworkloads"] = [workload()]
    fake.objects["deployments"] = [deployment()]
    fake.forbidden = {"/api/v1/pods", "/apis/vram.dev/v1alpha1/gpumodelworkloads"}
    text = await explained(apiserver)
    assert "pods and restarts of other namespaces are not counted" in text
    fake.forbidden.add("/apis/vram.dev/v1alpha1/namespaces/lab/gpumodelworkloads")
    with pytest.raises(ExplainError, match=r"403 cannot list gpumodelworkloads"):
        await explained(apiserver)


async def test_what_is_missing_is_said_with_what_to_do(apiserver: Served) -> None:
    fake, _ = apiserver
    with pytest.raises(ExplainError, match=r"no GPUModelWorkload speech in namespace lab; kubectl"):
        await explained(apiserver)
    fake.objects["gpumodelworkloads"] = [
        {"metadata": metadata("speech", 1), "spec": {"restart": {"maxUnavailable": []}}}
    ]
    with pytest.raises(ExplainError, match=r"lab/speech cannot be read: .*maxUnavailable"):
        await explained(apiserver)
    fake.has_crds = False
    with pytest.raises(ExplainError, match=r"vram-operator crds \| kubectl apply"):
        await explained(apiserver)
    nobody = Connection(Configuration(host="http://127.255.0.3:1"), "vram-system")
    with pytest.raises(ExplainError, match=r"http://127\.255\.0\.3:1"):
        await answer(nobody, Settings(), Question(KEY), SystemClock())


@pytest.mark.parametrize("name", ["speech", "lab/", "/speech", "lab/speech/more"])
def test_a_workload_is_named_with_its_namespace(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", name])
    assert ended.value.code == 2
    assert "is not NAMESPACE/NAME, as in lab/speech" in capsys.readouterr().err


def test_without_a_cluster_there_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/kubeconfig")
    assert cli.main(["explain", "lab/speech"]) == 1
    assert "vram-operator: no cluster: " in capsys.readouterr().err
