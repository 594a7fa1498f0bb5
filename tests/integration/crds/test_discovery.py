"""What a person sees through kubectl: names, columns and explanations."""

from __future__ import annotations

import re
from typing import Any

import pytest
from vram_operator import api as types

from tests.cluster import Cluster
from tests.integration.crds.conftest import NAMESPACE, RawApi, collection
from tests.integration.crds.objects import pod_restart, templated
from tests.integration.crds.test_subresources import FULL_STATUS, apply_status

pytestmark = pytest.mark.control_plane


def test_short_names_and_the_category_find_both_kinds(installed: Cluster, api: RawApi) -> None:
    api.create("gpumodelworkloads", templated("short")).accepted()
    api.create("gpupodrestarts", pod_restart("short")).accepted()
    get = ("get", "-n", NAMESPACE, "-o", "name")
    assert "gpumodelworkload.vram.dev/short" in installed.kubectl(*get, "gmw").split()
    assert "gpupodrestart.vram.dev/short" in installed.kubectl(*get, "gpr").split()
    both = installed.kubectl(*get, "gpu").split()
    assert {"gpumodelworkload.vram.dev/short", "gpupodrestart.vram.dev/short"} <= set(both)


def test_kubectl_scale_works_on_the_short_name(installed: Cluster, api: RawApi) -> None:
    api.create("gpumodelworkloads", templated("scaling")).accepted()
    installed.kubectl("-n", NAMESPACE, "scale", "gmw/scaling", "--replicas=4")
    stored = api.send("GET", f"{collection('gpumodelworkloads')}/scaling").accepted()
    assert stored["spec"]["template"]["replicas"] == 4


def row(table: dict[str, Any], name: str) -> dict[str, Any]:
    columns = [column["name"] for column in table["columnDefinitions"]]
    found = [line["cells"] for line in table["rows"] if line["object"]["metadata"]["name"] == name]
    return dict(zip(columns, found[0], strict=True))


def test_workloads_have_the_documented_columns(api: RawApi) -> None:
    api.create("gpumodelworkloads", templated("columns")).accepted()
    apply_status(api, "gpumodelworkloads", "columns", FULL_STATUS).accepted()
    table = api.table(collection("gpumodelworkloads"))
    shown = {column["name"]: column["priority"] for column in table["columnDefinitions"]}
    assert list(shown) == [
        "Name",
        "Target",
        "Ready",
        "Models",
        "VRAM",
        "Residual",
        "Last-Restart",
        "Next-Restart",
        "Reason",
        "Agents",
        "Age",
    ]
    assert [name for name, priority in shown.items() if priority] == ["Reason", "Agents"]
    cells = row(table, "columns")
    del cells["Age"], cells["Last-Restart"]
    assert cells == {
        "Name": "columns",
        "Target": "Deployment/speech",
        "Ready": "Unknown",
        "Models": "0/1",
        "VRAM": "12Gi",
        "Residual": "512Mi",
        "Next-Restart": "2026-11-24T12:00:00Z",
        "Reason": "Pending",
        "Agents": 1,
    }


def test_a_last_restart_is_shown_by_its_age(api: RawApi) -> None:
    api.create("gpumodelworkloads", templated("aged")).accepted()
    path = f"{collection('gpumodelworkloads')}/aged/status"
    last = {**types.encode(FULL_STATUS)["lastRestart"], "time": "2020-01-01T00:00:00Z"}
    patch = {"status": {"lastRestart": last}}
    api.send("PATCH", path, patch, "application/merge-patch+json").accepted()
    age = row(api.table(collection("gpumodelworkloads")), "aged")["Last-Restart"]
    assert re.match(r"\d+y", age)


def test_restarts_have_the_documented_columns(api: RawApi) -> None:
    api.create("gpupodrestarts", pod_restart("columns")).accepted()
    status = types.RestartStatus(
        outcome=types.RestartOutcome.RECOVERED, reclaimed="9Gi", downtime_seconds=4
    )
    apply_status(api, "gpupodrestarts", "columns", status).accepted()
    table = api.table(collection("gpupodrestarts"))
    cells = row(table, "columns")
    assert cells.pop("Age") is not None
    assert list(cells.items()) == [
        ("Name", "columns"),
        ("Workload", "speech"),
        ("Pod", "speech-6c9f-abcde"),
        ("Trigger", "Manual"),
        ("Method", "Auto"),
        ("Outcome", "Recovered"),
        ("Reclaimed", "9Gi"),
        ("Downtime", 4),
    ]


def test_explain_teaches_what_residency_does(installed: Cluster) -> None:
    text = " ".join(installed.kubectl("explain", "gmw.spec.models.residency").split())
    for lesson in (
        "When the model is in VRAM, and where it goes when it is not.",
        "offloadTier <string> enum: PinnedHost, Host, Disk",
        "page-locked host memory of a live GPU process, whose CUDA context stays",
        "Unused for this many seconds, a model sinks to idleTier. 0: never.",
    ):
        assert lesson in text


@pytest.mark.parametrize("name", ["gmw", "gpr"])
def test_explain_knows_every_field(installed: Cluster, name: str) -> None:
    text = installed.kubectl("explain", name, "--recursive")
    # Without a description kubectl still lists a field; the unit tests hold the descriptions.
    assert "spec" in text
    described = installed.kubectl("explain", f"{name}.spec")
    assert "<no description>" not in described
