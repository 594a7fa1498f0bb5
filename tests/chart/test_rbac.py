"""What the operator and people may do: what is needed, and no more."""

from __future__ import annotations

from typing import Any

import pytest
from vram_operator import kube
from vram_operator.signing import SECRET_NAME

from tests.chart.conftest import Helm, only

READ = {"get", "list", "watch"}
WRITE = {"create", "patch"}
# What each resource is for is in the template.
WANTED = {
    "vram.dev/gpumodelworkloads": READ | {"patch"},
    "vram.dev/gpumodelworkloads/status": {"update", "patch"},
    "vram.dev/gpumodelworkloads/finalizers": {"update"},
    "vram.dev/gpupodrestarts": READ | {"create", "delete"},
    "vram.dev/gpupodrestarts/status": {"update", "patch"},
    "/pods": READ,
    "/pods/eviction": {"create"},
    "apps/deployments": READ | WRITE,
    "apps/statefulsets": READ,
    "/services": READ | WRITE,
    "/configmaps": READ | WRITE,
    "events.k8s.io/events": WRITE,
}


def verbs(role: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{group}/{resource}", set()).update(rule["verbs"])
    return found


def test_the_cluster_role_is_this_and_no_more(helm: Helm) -> None:
    assert verbs(only(helm.template(), "ClusterRole", "vram-operator")) == WANTED


def test_the_role_in_a_namespace_is_the_same(helm: Helm) -> None:
    objects = helm.template({"namespaces": ["a"]})
    assert verbs(only(objects, "Role", "vram-operator")) == WANTED


def test_pods_are_deleted_only_when_that_is_allowed(helm: Helm) -> None:
    role = only(helm.template({"allowDelete": True}), "ClusterRole", "vram-operator")
    assert verbs(role) == {**WANTED, "/pods": READ | {"delete"}}


def test_every_resource_that_the_operator_knows_is_in_a_role(helm: Helm) -> None:
    known = {
        f"{'' if one.prefix == '/api/v1' else one.prefix.split('/')[2]}/{one.plural}"
        for one in vars(kube).values()
        if isinstance(one, kube.Resource)
    }
    objects = helm.template()
    own = verbs(only(objects, "Role", "vram-operator-own"))
    granted = WANTED.keys() | own.keys()
    assert known == {resource for resource in granted if resource.count("/") == 1}


def test_in_its_own_namespace_it_has_one_lease_and_one_secret(helm: Helm) -> None:
    role = only(helm.template(), "Role", "vram-operator-own")
    assert [
        (rule["resources"], rule.get("resourceNames"), rule["verbs"]) for rule in role["rules"]
    ] == [
        (["leases"], None, ["create"]),
        (["leases"], ["vram-operator"], ["get", "update"]),
        (["secrets"], None, ["create"]),
        (["secrets"], [SECRET_NAME], ["get"]),
    ]


@pytest.mark.parametrize("role", ["view", "edit", "admin"])
def test_roles_of_people_are_aggregated(helm: Helm, role: str) -> None:
    found = only(helm.template(), "ClusterRole", f"vram-operator-{role}")
    labels = found["metadata"]["labels"]
    assert labels[f"rbac.authorization.k8s.io/aggregate-to-{role}"] == "true"


def test_people_who_edit_can_ask_for_a_restart_and_not_remove_its_record(helm: Helm) -> None:
    edit = verbs(only(helm.template(), "ClusterRole", "vram-operator-edit"))
    assert edit["vram.dev/gpupodrestarts"] == {"create"}
    assert "vram.dev/gpumodelworkloads/status" not in edit
