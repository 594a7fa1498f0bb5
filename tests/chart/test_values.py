"""What the chart refuses, and what it says."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.chart.conftest import CHART, Helm, HelmError, Values

CONTRACT = {
    "image",
    "agentImage",
    "crds",
    "replicas",
    "namespaces",
    "resources",
    "nodeSelector",
    "tolerations",
    "affinity",
    "serviceAccount",
    "rbac",
    "allowDelete",
    "metrics",
    "networkPolicy",
    "podDisruptionBudget",
    "logFormat",
    "extraArgs",
}


def test_the_values_are_the_documented_ones() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(yaml.safe_load((CHART / "values.yaml").read_text())) == CONTRACT
    # Helm hands "global" to every subchart.
    assert set(schema["properties"]) == CONTRACT | {"global"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {"imagePullSecrets": []},
            "additional properties 'imagePullSecrets' not allowed",
            id="an unknown value",
        ),
        pytest.param(
            {"crds": {"install": True}},
            "at '/crds': additional properties 'install' not allowed",
            id="an unknown part of a value",
        ),
        pytest.param(
            {"metrics": {"podMonitor": True}},
            "at '/metrics/podMonitor': got boolean, want object",
            id="a switch where an object belongs",
        ),
        pytest.param(
            {"metrics": {"serviceMonitor": {"enabled": True}}},
            "additional properties 'serviceMonitor' not allowed",
            id="a monitor that is not offered",
        ),
        pytest.param(
            {"replicas": "two"}, "at '/replicas': got string, want integer", id="a number in words"
        ),
        pytest.param(
            {"logFormat": "xml"},
            "at '/logFormat': value must be one of 'json', 'console'",
            id="an unknown log format",
        ),
        pytest.param(
            {"namespaces": ["Team A"]}, "at '/namespaces/0'", id="a namespace that cannot be"
        ),
        pytest.param({"extraArgs": ["run"]}, "at '/extraArgs/0'", id="an argument that is no flag"),
        pytest.param(
            {"image": {"digest": "latest"}}, "at '/image/digest'", id="a digest that is none"
        ),
        pytest.param(
            {"image": {"repository": "r/x@sha256:abc"}},
            "at '/image/repository'",
            id="a digest in the repository",
        ),
        pytest.param({"allowDelete": "yes"}, "at '/allowDelete'", id="a switch in words"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(helm: Helm, values: Values, message: str) -> None:
    with pytest.raises(HelmError) as refusal:
        helm.template(values)
    assert message in str(refusal.value)


def test_values_of_a_parent_chart_are_passed_over(helm: Helm) -> None:
    assert helm.template({"global": {"anything": 1}})
