"""The control port of an embedded agent, over HTTP."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from vram_agent import Manager
from vram_agent.embed import ControlOptions
from vram_agent.errors import DrainingError
from vram_agent.protocol import AgentMode, Report
from vram_agent.serving.app import ListenError

from tests.unit.agent.embed.conftest import (
    Background,
    Factory,
    MakeManager,
    find,
    state,
    when,
    when_idle,
)

UNSIGNED = ControlOptions(allow_unsigned=True)


class Port:
    """The control port as the operator calls it."""

    def __init__(self, manager: Manager, control: ControlOptions = UNSIGNED) -> None:
        self.address = manager.serve_control("127.0.0.1", 0, control)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def test_report_probes_and_metrics_are_open(manager: Manager) -> None:
    manager.register("a", Factory())
    port = Port(manager, ControlOptions())
    with manager.use("a"):
        status, body = port.call("GET", "/report")
        report = msgspec.json.decode(body, type=Report)
        assert (status, report.agent.mode) == (200, AgentMode.EMBED)
        assert (state(report), find(report, "a").in_flight) == ("Resident/VRAM", 1)
        metrics = port.call("GET", "/metrics")[1].decode()
        assert 'vram_agent_model_state{model="a",state="Resident"} 1.0' in metrics
    assert port.call("GET", "/healthz")[0] == 200
    assert port.call("GET", "/readyz")[0] == 200
    for path in ("/drain", "/restart", "/models/a/unload"):
        assert port.call("POST", path)[0] == 401
    assert manager.report().draining is False


def test_a_second_port_and_one_that_is_in_use_are_refused(
    manager: Manager, make_manager: MakeManager
) -> None:
    port = Port(manager)
    with pytest.raises(RuntimeError, match=f"the control port is {port.address} already"):
        manager.serve_control("127.0.0.1", 0)
    other = make_manager()
    with pytest.raises(ListenError, match="in use"):
        other.serve_control("127.0.0.1", int(port.address.rpartition(":")[2]))
    assert other.serve_control("127.0.0.1", 0) != port.address


def test_the_operator_moves_models(manager: Manager) -> None:
    factory = Factory()
    manager.register("a", factory)
    port = Port(manager)
    assert port.call("POST", "/models/a/load")[0] == 200
    assert state(manager.report()) == "Resident/VRAM"
    assert port.call("POST", "/models/a/offload")[0] == 200
    assert state(manager.report()) == "Offloaded/PinnedHost"
    assert port.call("POST", "/scrub")[0] == 200
    assert port.call("POST", "/models/a/offload?tier=Host")[0] == 200
    assert state(manager.report()) == "Absent/Disk"
    with manager.use("a"):
        assert factory.calls == 2
    assert port.call("POST", "/models/a/unload")[0] == 200
    assert state(manager.report()) == "Absent/Disk"


def test_a_call_waits_for_the_uses_and_those_who_come_later_wait_for_the_call(
    manager: Manager, in_background: Callable[[str], Background]
) -> None:
    factory = Factory()
    manager.register("a", factory)
    port = Port(manager)
    first = in_background("a").wait()
    answers: list[int] = []
    call = threading.Thread(target=lambda: answers.append(port.call("POST", "/models/a/unload")[0]))
    call.start()
    when(manager, lambda report: not report.idle and bool(manager._core._supervisor._calls))  # type: ignore[union-attr]
    late = in_background("a")
    when(manager, lambda report: find(report, "a").queued == 1)
    assert not answers
    first.end()
    call.join(60)
    assert answers == [200]
    assert late.wait().value is not first.value
    assert factory.calls == 2


def test_a_drain_refuses_new_uses_and_waits_for_those_that_go_on(
    manager: Manager, in_background: Callable[[str], Background]
) -> None:
    manager.register("a", Factory())
    port = Port(manager)
    use = in_background("a").wait()
    answers: list[int] = []
    drain = threading.Thread(target=lambda: answers.append(port.call("POST", "/drain")[0]))
    drain.start()
    when(manager, lambda report: report.draining)
    with pytest.raises(DrainingError, match="no new requests"), manager.use("a"):
        pass
    assert port.call("GET", "/readyz")[0] == 503
    assert not answers
    use.end()
    drain.join(60)
    assert answers == [200]
    assert port.call("POST", "/resume")[0] == 200
    with manager.use("a"):
        pass


def test_a_recycle_is_answered_with_501_and_changes_nothing(manager: Manager) -> None:
    port = Port(manager)
    status, body = port.call("POST", "/recycle", {"restartID": "r-1"})
    assert status == 501
    assert b"the application's own process" in body
    report = manager.report()
    assert (report.draining, report.action) == (False, None)


def test_a_config_changes_limits_and_residencies_but_not_what_the_models_are(
    manager: Manager,
) -> None:
    factory = Factory()
    manager.register("a", factory)
    port = Port(manager)
    model = {
        "name": "a",
        "runtime": "Whisper",
        "source": "large-v3",
        "residency": {"afterTask": "Keep", "idleTier": "Host"},
    }
    config = {"metadata": {"generation": 7}, "models": [model], "vram": {"budget": "1Gi"}}
    assert port.call("PUT", "/config", config)[0] == 200
    with manager.use("a"):
        pass
    report = when_idle(manager)
    assert (report.config_generation, state(report)) == (7, "Resident/VRAM")
    assert (find(report, "a").runtime.value, factory.calls) == ("Python", 1)
    # A model that is registered later keeps what was configured.
    manager.register("b", Factory(2))
    assert manager.report().config_generation == 7


def test_a_config_without_a_registered_model_keeps_it_and_one_with_a_strange_model_is_refused(
    manager: Manager,
) -> None:
    manager.register("a", Factory())
    port = Port(manager)
    assert port.call("PUT", "/config", {})[0] == 200
    strange = {"name": "b", "runtime": "ONNX", "source": "/b.onnx"}
    status, body = port.call("PUT", "/config", {"models": [strange]})
    assert status == 400
    assert b"has no b; it has: a" in body
    assert [model.name for model in manager.report().models] == ["a"]
