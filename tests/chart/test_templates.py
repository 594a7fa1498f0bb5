"""What the chart makes of its values, as parsed objects."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from vram_operator import __version__, crds

from tests.chart.conftest import CHART, KUBERNETES, NAMESPACE, Helm, Values, kinds, only

EVERYTHING: Values = {
    "allowDelete": True,
    "metrics": {
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    },
    "networkPolicy": {"enabled": True},
    "logFormat": "console",
    "extraArgs": ["--max-concurrent-restarts=20%"],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "serviceAccount": {"annotations": {"a": "b"}},
}
NOTHING: Values = {
    "crds": {"enabled": False},
    "rbac": {"create": False},
    "serviceAccount": {"create": False},
    "podDisruptionBudget": {"enabled": False},
}
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace"}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="the defaults"),
        pytest.param(EVERYTHING, id="everything on"),
        pytest.param(NOTHING, id="everything off"),
        pytest.param({"namespaces": ["a", "b"]}, id="two namespaces"),
    ],
)
def test_the_chart_passes_the_strict_linter(helm: Helm, values: Values) -> None:
    assert "0 chart(s) failed" in helm.lint(values)


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


def test_the_defaults_install_what_the_operator_needs_and_nothing_optional(helm: Helm) -> None:
    objects = helm.template()
    assert kinds(objects) == {
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "Deployment",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    }
    assert only(objects, "Deployment")["spec"]["replicas"] == 2
    assert container(objects)["image"] == f"vram-operator:{__version__}"
    assert container(objects)["args"] == [
        "run",
        f"--agent-image=vram-agent:{__version__}",
        "--lease-name=vram-operator",
        "--log-format=json",
        "--metrics-port=8080",
    ]


def test_every_value_that_is_a_flag_reaches_the_command(helm: Helm) -> None:
    values = {**EVERYTHING, "namespaces": ["a", "b"]}
    arguments = container(helm.template(values))["args"]
    assert "--allow-delete" in arguments
    assert "--log-format=console" in arguments
    assert "--max-concurrent-restarts=20%" in arguments
    assert [one for one in arguments if one.startswith("--namespace")] == [
        "--namespace=a",
        "--namespace=b",
    ]


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        pytest.param({"repository": "r/x"}, f"r/x:{__version__}", id="the chart's version"),
        pytest.param({"repository": "r/x", "tag": "7"}, "r/x:7", id="a tag"),
        pytest.param(
            {"repository": "r:5000/x", "tag": "7", "digest": "sha256:" + "a" * 64},
            "r:5000/x@sha256:" + "a" * 64,
            id="a digest wins",
        ),
    ],
)
def test_images_are_named_by_tag_or_digest(
    helm: Helm, image: dict[str, str], reference: str
) -> None:
    found = container(helm.template({"image": image, "agentImage": image}))
    assert found["image"] == reference
    assert f"--agent-image={reference}" in found["args"]


def test_pods_are_placed_as_asked(helm: Helm) -> None:
    pod = only(helm.template(EVERYTHING), "Deployment")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert pod["tolerations"] == [{"key": "system", "operator": "Exists"}]
    assert "nodeAffinity" in pod["affinity"]


def test_the_pod_meets_the_restricted_standard_and_writes_nowhere_but_tmp(helm: Helm) -> None:
    pod = only(helm.template(), "Deployment")["spec"]["template"]["spec"]
    assert (
        pod["securityContext"]
        | {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        == pod["securityContext"]
    )
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["containers"][0]["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert [volume.keys() for volume in pod["volumes"]] == [{"name", "emptyDir"}]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def test_probes_ask_the_documented_paths_of_port_8080(helm: Helm) -> None:
    found = container(helm.template())
    assert found["ports"] == [{"name": "metrics", "containerPort": 8080}]
    assert found["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert found["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    fields = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in found["env"]}
    assert fields == {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace"}


def installed_crds(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] == "CustomResourceDefinition"]


def test_crds_are_those_of_the_operator_and_outlive_the_release(helm: Helm) -> None:
    found = installed_crds(helm.template())
    assert [one["spec"] for one in found] == [one["spec"] for one in crds.crds()]
    for one in found:
        assert one["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_crds_go_with_the_release_when_asked_to(helm: Helm) -> None:
    found = installed_crds(helm.template({"crds": {"keep": False}}))
    assert [one["metadata"].get("annotations") for one in found] == [None, None]


def test_without_crds_and_with_namespaces_nothing_is_cluster_wide(helm: Helm) -> None:
    values = {"crds": {"enabled": False}, "namespaces": ["a", "b"]}
    objects = helm.template(values)
    assert not CLUSTER_SCOPED & kinds(objects)
    roles = {
        (one["metadata"]["namespace"], one["metadata"]["name"])
        for one in objects
        if one["kind"] == "Role"
    }
    assert roles == {
        ("a", "vram-operator"),
        ("b", "vram-operator"),
        (NAMESPACE, "vram-operator-own"),
    }


def test_an_account_of_ones_own_is_used(helm: Helm) -> None:
    objects = helm.template({"serviceAccount": {"create": False, "name": "mine"}})
    assert "ServiceAccount" not in kinds(objects)
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "mine"
    subjects = [
        subject["name"]
        for one in objects
        if one["kind"] in {"ClusterRoleBinding", "RoleBinding"}
        for subject in one["subjects"]
    ]
    assert set(subjects) == {"mine"}


def test_everything_off_leaves_the_operator_alone(helm: Helm) -> None:
    assert kinds(helm.template(NOTHING)) == {"Deployment", "Service"}


def test_monitoring_selects_the_operator_and_every_agent(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    operator = only(objects, "PodMonitor", "vram-operator")["spec"]
    assert operator["selector"]["matchLabels"].items() <= labels.items()
    agents = only(objects, "PodMonitor", "vram-operator-agents")["spec"]
    assert agents["namespaceSelector"] == {"any": True}
    (endpoint,) = agents["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("control", "/metrics")
    assert [one["targetLabel"] for one in endpoint["relabelings"]] == ["workload"]
    narrowed = helm.template({**EVERYTHING, "namespaces": ["a"]})
    agents = only(narrowed, "PodMonitor", "vram-operator-agents")["spec"]
    assert agents["namespaceSelector"] == {"matchNames": ["a"]}


def test_rules_and_dashboards_are_the_plain_files(helm: Helm) -> None:
    objects = helm.template(EVERYTHING)
    rules = yaml.safe_load((CHART / "files/alerts/vram-operator.yaml").read_text())
    assert only(objects, "PrometheusRule")["spec"] == rules
    shown = {
        name: json.loads(text)
        for one in objects
        if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
        for name, text in one["data"].items()
    }
    files = sorted((CHART / "files/dashboards").glob("*.json"))
    assert shown == {path.name: json.loads(path.read_text()) for path in files}


def test_the_network_policy_lets_the_operator_reach_agents_on_any_port(helm: Helm) -> None:
    policy = only(helm.template(EVERYTHING), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": "metrics"}]}]
    agents = [rule for rule in policy["egress"] if "to" in rule]
    assert [rule.keys() for rule in agents] == [{"to"}]


def test_the_longest_release_name_still_makes_valid_names_and_labels(helm: Helm) -> None:
    release = ("template", "r" * 53, str(CHART), KUBERNETES)
    objects = [one for one in yaml.safe_load_all(helm.run(*release, values=EVERYTHING)) if one]
    assert len(only(objects, "Service")["metadata"]["name"]) <= 63
    labels = [one["metadata"].get("labels", {}).values() for one in objects]
    assert max(len(value) for values in labels for value in values) <= 63


def test_the_versions_of_chart_and_operator_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_the_readme_has_every_value() -> None:
    readme = (CHART / "README.md").read_text()
    for name, value in yaml.safe_load((CHART / "values.yaml").read_text()).items():
        assert f"`{name}" in readme
        if isinstance(value, dict) and name in {"crds", "metrics"}:
            for part in value:
                assert f"`{name}.{part}" in readme
