"""A release of the chart from its installation to its end, on a real apiserver."""

from __future__ import annotations

import json

import pytest

from tests.chart.conftest import CHART, Helm, Values
from tests.chart.test_templates import EVERYTHING
from tests.cluster import Cluster

pytestmark = pytest.mark.control_plane

FOREIGN = {"PodMonitor", "PrometheusRule"}
MONITORS = ("podMonitor", "prometheusRule")


def test_a_release_is_installed_upgraded_rolled_back_and_uninstalled(
    helm: Helm, control_plane: Cluster
) -> None:
    name = "life"
    where = (f"--kubeconfig={control_plane.kubeconfig}", f"--namespace={name}")
    # The CRDs belong to the release that other tests install; one cluster has one of them.
    values: Values = {**EVERYTHING, "crds": {"enabled": False}}
    values["metrics"] = {**EVERYTHING["metrics"], **{k: {"enabled": False} for k in MONITORS}}

    def replicas() -> int:
        found = control_plane.kubectl(
            "get", "deployment", f"{name}-vram-operator", "-n", name, "-o", "json"
        )
        return int(json.loads(found)["spec"]["replicas"])

    helm.run("install", name, str(CHART), *where, "--create-namespace", values=values)
    assert replicas() == 2
    helm.run("upgrade", name, str(CHART), *where, values={**values, "replicas": 1})
    assert replicas() == 1
    helm.run("rollback", name, "1", *where)
    assert replicas() == 2
    helm.run("uninstall", name, *where)
    left = control_plane.kubectl("get", "deployment,service,configmap,role", "-n", name, "-o=name")
    assert left.split() == ["configmap/kube-root-ca.crt"]


def test_the_apiserver_takes_everything_that_the_chart_can_make(
    helm: Helm, control_plane: Cluster
) -> None:
    """Strict: an unknown field of any object is refused. What is left out needs foreign CRDs."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict"}}
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    objects = [one for one in helm.template(EVERYTHING) if one["kind"] not in FOREIGN]
    for one in objects:
        if "namespace" in one["metadata"]:
            one["metadata"]["namespace"] = "strict"
    taken = control_plane.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server"),
        *("--validate=strict", "-f", "-"),
        stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}),
    )
    assert len(taken.splitlines()) == len(objects)
