"""What stands beside the chart: the Kustomize base, Argo CD's health checks, kube-state-metrics."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from vram_operator import crds

from tests.chart.conftest import ROOT, Helm
from tests.chart.kustomize import BASE, FILE, rendered
from tests.cluster import Cluster

ARGO_CD = yaml.safe_load((ROOT / "deploy/argocd/argocd-cm.yaml").read_text())["data"]
STATE_METRICS = yaml.safe_load(
    (ROOT / "deploy/kube-state-metrics/custom-resource-state.yaml").read_text()
)
SCHEMAS = {
    one["spec"]["names"]["kind"]: one["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for one in crds.crds()
}


# --- Kustomize ------------------------------------------------------------------------------------


def test_the_kustomize_base_is_what_the_chart_makes_of_its_defaults(helm: Helm) -> None:
    assert FILE.read_text() == rendered(helm), "run: make generate"


@pytest.mark.control_plane
def test_the_apiserver_takes_the_kustomize_base(control_plane: Cluster) -> None:
    # A dry run creates no namespace for what is in it.
    namespace = str(BASE / "namespace.yaml")
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", namespace)
    taken = control_plane.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server"),
        *("--validate=strict", "-k", str(BASE)),
    )
    built = control_plane.kubectl("kustomize", str(BASE))
    assert len(taken.splitlines()) == len(list(yaml.safe_load_all(built)))


# --- Argo CD --------------------------------------------------------------------------------------


def lua(value: Any) -> str:
    """Write a JSON value as Lua."""
    match value:
        case dict():
            return "{" + ", ".join(f"[{lua(key)}] = {lua(one)}" for key, one in value.items()) + "}"
        case list():
            return "{" + ", ".join(map(lua, value)) + "}"
        case None:
            return "nil"
        case _:
            return json.dumps(value)


def health(kind: str, obj: dict[str, Any]) -> tuple[str, str]:
    """Run the check as Argo CD does: ``obj`` is a global, the chunk returns a table."""
    check = ARGO_CD[f"resource.customizations.health.vram.dev_{kind}"]
    chunk = (
        f"obj = {lua(obj)}\nlocal found = (function()\n{check}\nend)()\n"
        'io.write(found.status, "\\n", found.message)'
    )
    done = subprocess.run(["lua5.4", "-"], input=chunk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, _, message = done.stdout.partition("\n")
    return status, message


def workload(generation: int = 1, **conditions: tuple[str, str, str]) -> dict[str, Any]:
    """Generation 1 was looked at; a condition is its status, reason and message."""
    listed = [
        {"type": type_, "status": status, "reason": reason, "message": message}
        for type_, (status, reason, message) in conditions.items()
    ]
    return {
        "metadata": {"generation": generation},
        "status": {"observedGeneration": 1, "conditions": listed},
    }


ACCEPTED = ("True", "Accepted", "")
READY = ("True", "Ready", "")
WAITING = ("False", "ReplicasNotReady", "0 of 1 pods are ready")


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        pytest.param(
            {"metadata": {"generation": 1}},
            ("Progressing", "the operator has not looked at it yet"),
            id="new",
        ),
        pytest.param(
            workload(2, Accepted=ACCEPTED, Ready=READY),
            ("Progressing", "the operator has not looked at it yet"),
            id="changed since it was looked at",
        ),
        pytest.param(
            workload(
                Accepted=("False", "MissingLabel", "add it"), Ready=("False", "NotAccepted", "")
            ),
            ("Degraded", "MissingLabel: add it"),
            id="not accepted",
        ),
        pytest.param(
            workload(Accepted=ACCEPTED, Ready=("False", "ModelFailed", "whisper on a: no file")),
            ("Degraded", "ModelFailed: whisper on a: no file"),
            id="a failed model",
        ),
        pytest.param(
            workload(Accepted=ACCEPTED, Ready=READY, Degraded=("True", "RestartsDoNotHelp", "3")),
            ("Degraded", "RestartsDoNotHelp: 3"),
            id="restarts do not help",
        ),
        pytest.param(
            workload(Accepted=ACCEPTED, Ready=WAITING),
            ("Progressing", "ReplicasNotReady: 0 of 1 pods are ready"),
            id="starting",
        ),
        pytest.param(
            workload(Accepted=ACCEPTED, Ready=("True", "ScaledToZero", "")),
            ("Suspended", "scaled to zero"),
            id="scaled to zero",
        ),
        pytest.param(
            workload(Accepted=ACCEPTED, Ready=READY, Degraded=("False", "Healthy", "")),
            ("Healthy", "Ready"),
            id="ready",
        ),
    ],
)
@pytest.mark.usefixtures("lua_interpreter")
def test_argo_cd_sees_the_health_of_a_workload(
    obj: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert health("GPUModelWorkload", obj) == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(None, ("Progressing", "runs"), id="new"),
        pytest.param(
            {"conditions": [{"type": "Admitted", "status": "False", "reason": "NodeBusy"}]},
            ("Progressing", "NodeBusy"),
            id="blocked",
        ),
        pytest.param({"outcome": "Recovered"}, ("Healthy", "Recovered"), id="recovered"),
        pytest.param({"outcome": "Skipped"}, ("Healthy", "Skipped"), id="skipped"),
        pytest.param({"outcome": "NotRecovered"}, ("Degraded", "NotRecovered"), id="no help"),
        pytest.param({"outcome": "Failed"}, ("Degraded", "Failed"), id="failed"),
    ],
)
@pytest.mark.usefixtures("lua_interpreter")
def test_argo_cd_sees_the_health_of_a_restart(
    status: dict[str, Any] | None, expected: tuple[str, str]
) -> None:
    assert health("GPUPodRestart", {"metadata": {}, "status": status}) == expected


# --- kube-state-metrics ---------------------------------------------------------------------------


def paths() -> Iterator[tuple[str, list[str]]]:
    """Each path of the file from the object's root, with its kind."""
    for resource in STATE_METRICS["spec"]["resources"]:
        kind = resource["groupVersionKind"]["kind"]
        for path in resource["labelsFromPath"].values():
            yield kind, path
        for metric in resource["metrics"]:
            each = dict(metric["each"])
            body = each.pop(
                {"Info": "info", "Gauge": "gauge", "StateSet": "stateSet"}[each["type"]]
            )
            root = body.get("path", [])
            below = [body.get("valueFrom", []), *body.get("labelsFromPath", {}).values()]
            yield from ((kind, [*root, *path]) for path in below if root or path)


@pytest.mark.parametrize(("kind", "path"), list(paths()))
def test_a_metric_of_kube_state_metrics_reads_a_field_that_exists(
    kind: str, path: list[str]
) -> None:
    schema = SCHEMAS[kind]
    if path[0] == "metadata":
        assert path[1] in {"name", "namespace", "creationTimestamp"}
        return
    for name in path:
        schema = schema.get("items", schema)["properties"][name]


def test_metrics_of_kube_state_metrics_do_not_collide() -> None:
    assert STATE_METRICS["kind"] == "CustomResourceStateMetrics"
    names = [
        f"{resource['metricNamePrefix']}_{metric['name']}"
        for resource in STATE_METRICS["spec"]["resources"]
        for metric in resource["metrics"]
    ]
    assert len(names) == len(set(names))
    assert not any(name.startswith(("vram_operator_", "vram_agent_")) for name in names)
