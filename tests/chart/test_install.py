"""The chart on a real apiserver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.conftest import CHART, NAMESPACE, RELEASE, Helm, only
from tests.cluster import Cluster, ClusterError

pytestmark = pytest.mark.control_plane

ACCOUNT = f"--as=system:serviceaccount:{NAMESPACE}:vram-operator"


@pytest.fixture(scope="module")
def installed(helm: Helm, control_plane: Cluster) -> Iterator[Cluster]:
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": NAMESPACE,
            "labels": {
                "pod-security.kubernetes.io/enforce": "restricted",
                "pod-security.kubernetes.io/enforce-version": "latest",
            },
        },
    }
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    helm.run("install", RELEASE, str(CHART), *_where(control_plane), values=_values())
    yield control_plane
    helm.run("uninstall", RELEASE, *_where(control_plane))


def _where(control_plane: Cluster) -> tuple[str, str]:
    return (f"--kubeconfig={control_plane.kubeconfig}", f"--namespace={NAMESPACE}")


def _values() -> dict[str, Any]:
    return {"networkPolicy": {"enabled": True}, "metrics": {"dashboards": {"enabled": True}}}


def wait_for(what: str, seconds: float, condition: Any) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


def test_a_namespace_of_the_restricted_standard_takes_the_pods(installed: Cluster) -> None:
    """The Deployment's own controller creates them, or they never appear."""

    def pods() -> list[str]:
        listed = installed.kubectl("get", "pods", "-n", NAMESPACE, "-o", "name")
        return listed.split()

    wait_for("two pods of the operator", 30, lambda: len(pods()) == 2)


def test_no_warning_is_given_about_the_pod(installed: Cluster, helm: Helm) -> None:
    template = only(helm.template(_values()), "Deployment")["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": "by-hand"},
        "spec": {**template["spec"], "serviceAccountName": "default"},
    }
    created = installed.kubectl(
        *("create", "-n", NAMESPACE, "--dry-run=server", "--warnings-as-errors", "-f", "-"),
        stdin=json.dumps(pod),
    )
    assert "pod/by-hand created (server dry run)" in created


def test_the_crds_serve_workloads_once_the_chart_is_installed(installed: Cluster) -> None:
    crds = ("crd/gpumodelworkloads.vram.dev", "crd/gpupodrestarts.vram.dev")
    installed.kubectl("wait", "--for=condition=Established", "--timeout=30s", *crds)
    assert installed.kubectl("get", "gmw", "-A", "-o", "name") == ""


@pytest.mark.parametrize(
    ("verb", "resource", "allowed"),
    [
        ("watch", "gpumodelworkloads.vram.dev", True),
        ("update", "gpumodelworkloads.vram.dev/status", True),
        ("create", "gpupodrestarts.vram.dev", True),
        ("create", "pods/eviction", True),
        ("patch", "deployments.apps", True),
        ("create", "events.events.k8s.io", True),
        ("delete", "pods", False),
        ("patch", "pods", False),
        ("create", "pods/exec", False),
        ("get", "secrets", False),
        ("list", "secrets", False),
        ("patch", "statefulsets.apps", False),
        ("delete", "gpumodelworkloads.vram.dev", False),
        ("get", "nodes", False),
        ("list", "namespaces", False),
    ],
)
def test_the_operator_may_do_what_it_needs_in_any_namespace(
    installed: Cluster, verb: str, resource: str, *, allowed: bool
) -> None:
    resource, _, subresource = resource.partition("/")
    extra = [f"--subresource={subresource}"] if subresource else []
    assert can(installed, ACCOUNT, verb, resource, *extra, "-n", "default") is allowed


@pytest.mark.parametrize(
    ("verb", "resource", "allowed"),
    [
        ("get", "secrets/vram-operator-signing-key", True),
        ("get", "secrets/another", False),
        ("update", "leases.coordination.k8s.io/vram-operator", True),
        ("update", "leases.coordination.k8s.io/another", False),
    ],
)
def test_the_operator_has_its_own_lease_and_key_only(
    installed: Cluster, verb: str, resource: str, *, allowed: bool
) -> None:
    assert can(installed, ACCOUNT, verb, resource, "-n", NAMESPACE) is allowed


@pytest.mark.parametrize(
    ("role", "verb", "resource", "allowed"),
    [
        ("view", "list", "gpupodrestarts.vram.dev", True),
        ("view", "create", "gpumodelworkloads.vram.dev", False),
        ("edit", "create", "gpumodelworkloads.vram.dev", True),
        ("edit", "create", "gpupodrestarts.vram.dev", True),
        ("edit", "delete", "gpupodrestarts.vram.dev", False),
        ("admin", "delete", "gpupodrestarts.vram.dev", True),
    ],
)
def test_people_get_their_rights_through_the_usual_roles(
    installed: Cluster, role: str, verb: str, resource: str, *, allowed: bool
) -> None:
    binding = f"a-{role}"
    apply = ("create", "rolebinding", binding, f"--clusterrole={role}", f"--user={role}er")
    manifest = installed.kubectl(*apply, "-n", "default", "--dry-run=client", "-o", "json")
    installed.kubectl("apply", "-n", "default", "-f", "-", stdin=manifest)

    def decided() -> bool:
        # Aggregation is done by a controller.
        return can(installed, f"--as={role}er", verb, resource, "-n", "default") is allowed

    wait_for(f"{role} may {'' if allowed else 'not '}{verb} {resource}", 20, decided)


def can(where: Cluster, *arguments: str) -> bool:
    try:
        return where.kubectl("auth", "can-i", *arguments).strip() == "yes"
    except ClusterError as error:
        if "exit 1" in str(error):
            return False
        raise


def test_an_upgrade_changes_nothing_when_the_values_are_the_same(
    installed: Cluster, helm: Helm
) -> None:
    def generation() -> str:
        path = "-o=jsonpath={.metadata.generation}"
        return installed.kubectl("get", "deployment", "-n", NAMESPACE, RELEASE, path)

    before = generation()
    helm.run("upgrade", RELEASE, str(CHART), *_where(installed), values=_values())
    assert generation() == before == "1"


def test_a_release_without_rights_on_the_cluster_stays_in_its_namespaces(
    installed: Cluster, helm: Helm
) -> None:
    other = "narrow"
    where = (f"--kubeconfig={installed.kubeconfig}", f"--namespace={other}")
    values = {"crds": {"enabled": False}, "namespaces": [other]}
    helm.run("install", other, str(CHART), *where, "--create-namespace", values=values)
    account = f"--as=system:serviceaccount:{other}:{other}-vram-operator"
    assert can(installed, account, "watch", "gpumodelworkloads.vram.dev", "-n", other)
    assert not can(installed, account, "watch", "gpumodelworkloads.vram.dev", "-n", "default")
    helm.run("uninstall", other, *where)


def test_workloads_outlive_the_release_and_belong_to_the_next(
    installed: Cluster, helm: Helm
) -> None:
    workload = {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "GPUModelWorkload",
        "metadata": {"name": "kept", "namespace": "default"},
        "spec": {"targetRef": {"kind": "Deployment", "name": "a"}},
    }
    installed.kubectl("apply", "-f", "-", stdin=json.dumps(workload))
    helm.run("uninstall", RELEASE, *_where(installed))
    found = installed.kubectl("get", "gmw", "-n", "default", "-o", "name")
    assert found.split() == ["gpumodelworkload.vram.dev/kept"]
    helm.run("install", RELEASE, str(CHART), *_where(installed), values=_values())
