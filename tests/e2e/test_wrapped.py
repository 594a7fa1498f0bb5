"""The objects of docs/wrapping.md on a real kubelet, around an application that leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from vram_agent.protocol import AgentMode, parse_quantity

from tests.e2e.system import Json, System
from tests.support.pages import ROOT, documents
from tests.support.project_images import project_image

APP = Path(__file__).with_name("leaking_app.py")
LEAKED_BYTES = 4 * 64 * 1024**2


def page_objects() -> dict[str, Json]:
    """What the page has people write; the last of a kind is that of its section on Kubernetes."""
    return {found["kind"]: found for found in documents(ROOT / "docs/wrapping.md")}


def on_this_node(deployment: Json) -> Json:
    """With the agent's image and our application in place of an image that has both, on the CPU."""
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    entry = ["vram-agent", "run", "--config", "/etc/vram-agent-config/config.yaml", "--"]
    dockerfile = (ROOT / "docs/wrapping.md").read_text("utf-8")
    assert json.dumps(["/opt/vram-agent/bin/vram-agent", *entry[1:]]) in dockerfile
    container |= {
        "image": project_image("agent").reference,
        "imagePullPolicy": "Never",
        "command": entry,
        "args": ["python", "/app/leaking_app.py"],
    }
    assert container.pop("resources") == {"limits": {"nvidia.com/gpu": 1}}
    container["volumeMounts"].append({"name": "app", "mountPath": "/app"})
    pod["volumes"].append({"name": "app", "configMap": {"name": "app"}})
    return deployment


@pytest.fixture
def wrapped(system: System) -> Iterator[System]:
    """With what the page says, a threshold of this application's size apart.

    The namespace enforces restricted pod security, and has the operator's keys already.
    """
    objects = page_objects()
    config = json.dumps(objects["AgentConfig"])
    system.kubectl("create", "configmap", "demo-agent", f"--from-literal=config.yaml={config}")
    system.kubectl("create", "configmap", "app", f"--from-file={APP}")
    workload = objects["GPUModelWorkload"]
    workload["spec"]["restart"]["residual"] |= {"threshold": "128Mi", "forSeconds": 4}
    system.apply(on_this_node(objects["Deployment"]), workload)
    yield system
    system.kubectl("delete", "gmw/demo", "deployment/demo", "configmap/demo-agent", "configmap/app")


def test_a_wrapped_application_that_leaks_is_recycled_inside_its_container(
    wrapped: System,
) -> None:
    wrapped.wait_ready("demo")

    def learned() -> Json | None:
        report = wrapped.report("demo")
        return report if report["memory"]["modelBytes"] else None

    fresh = wrapped.wait("a baseline", 60, learned)
    assert fresh["agent"]["mode"] == AgentMode.RUN
    assert fresh["models"] == []
    before = wrapped.container("demo")
    for count in ("1", "2", "3", "4"):
        assert wrapped.ask_port("demo", 7860, "POST", "/leak").body.decode() == count

    restart = wrapped.wait("a finished restart", 120, lambda: wrapped.finished("demo"))
    status = restart["status"]
    assert restart["spec"]["trigger"] == "Residual"
    assert status["outcome"] == "Recovered", restart
    assert [attempt["method"] for attempt in status["attempts"]] == ["Recycle"]
    assert parse_quantity(status["reclaimed"]) > 0.9 * LEAKED_BYTES
    after = wrapped.container("demo")
    assert after["containerID"] == before["containerID"]
    assert after["restartCount"] == 0
    cured = wrapped.report("demo")
    assert cured["agent"]["bootID"] == fresh["agent"]["bootID"]
    assert cured["agent"]["epoch"] == 1
    assert wrapped.ask_port("demo", 7860, "GET", "/").body == b"0"
    wrapped.wait_ready("demo")
