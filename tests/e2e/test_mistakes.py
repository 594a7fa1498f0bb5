"""What a person does wrong is refused, or said, in one clear message each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import models
from tests.e2e.system import Json, System, find_condition
from tests.e2e.workloads import WHISPER, workload


def changed(path: list[str | int], value: Any) -> Json:
    manifest = workload("mistake", [{**WHISPER, "residency": {}}], {"schedule": "0 3 * * *"})
    place: Any = manifest["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(["models", 0, "runtime"], "Wisper", "Unsupported value", id="unknown runtime"),
        pytest.param(["models", 0, "residensy"], {}, "unknown field", id="misspelt field"),
        pytest.param(["restart", "residual"], {"threshold": "0"}, "above zero", id="no threshold"),
        pytest.param(["restart", "cooldownSeconds"], 60, "630", id="too short a cooldown"),
        pytest.param(["models"], [], "models", id="a template without models"),
    ],
)
def test_bad_yaml_is_refused_with_what_and_where(
    system: System, path: list[str | int], value: Any, message: str
) -> None:
    refused = system.try_kubectl("apply", "-f", "-", stdin=json.dumps(changed(path, value)))
    assert refused.returncode != 0
    assert message in refused.stderr, refused.stderr
    assert system.try_kubectl("get", "gmw", "mistake").returncode != 0


def test_a_schedule_that_does_not_parse_sets_accepted_false_and_does_nothing(
    system: System,
) -> None:
    manifest = workload("unscheduled", [WHISPER], {"schedule": "61 3 * * *"})
    system.apply(manifest)

    def refused() -> Json | None:
        condition = find_condition(system.get("gmw", "unscheduled"), "Accepted")
        return condition if condition.get("status") == "False" else None

    condition = system.wait("Accepted=False", 30, refused)
    assert condition["reason"] == "InvalidSchedule"
    assert "61" in condition["message"]
    assert not [gpr for gpr in system.items("gpr") if gpr["spec"]["workload"] == "unscheduled"]
    system.kubectl("delete", "gmw", "unscheduled")


def test_a_missing_model_file_fails_that_model_and_the_other_serves(system: System) -> None:
    missing = {**WHISPER, "name": "missing", "source": "/models/no-such.pt"}
    system.apply(workload("half", [missing, WHISPER]))
    system.wait_ready("half")
    clip = models.clips()[0]
    answer = system.transcribe("half", clip.path, {"model": "missing"})
    assert answer.status == 503
    assert "/models/no-such.pt" in answer.json()["error"]["message"]
    answer = system.transcribe("half", clip.path, {"model": "whisper"})
    assert answer.status == 200, answer

    def told() -> Json | None:
        entries = system.get("gmw", "half")["status"].get("models", [])
        return next((e for e in entries if e["name"] == "missing" and e["failed"] == 1), None)

    entry = system.wait("the failed model in the status", 30, told)
    assert "no-such.pt" in entry["message"]
    system.kubectl("delete", "gmw", "half")
