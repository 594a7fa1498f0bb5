"""What of a stored GPUModelWorkload can change, and what cannot."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.crds.conftest import RawApi
from tests.integration.crds.objects import WHISPER, referring, templated

pytestmark = pytest.mark.control_plane

GMW = "gpumodelworkloads"


@pytest.mark.parametrize(
    ("stored", "patch", "message"),
    [
        pytest.param(
            referring("choice-1"),
            {"targetRef": None, "template": {}, "models": [WHISPER]},
            "the choice between spec.targetRef and spec.template is immutable; create another "
            "workload",
            id="from a reference to a template",
        ),
        pytest.param(
            templated("choice-2"),
            {"targetRef": {"kind": "Deployment", "name": "a"}, "template": None},
            "the choice between spec.targetRef and spec.template is immutable",
            id="from a template to a reference",
        ),
        pytest.param(
            referring("choice-3"),
            {"targetRef": {"name": "another"}},
            "spec.targetRef is immutable; create another workload",
            id="to another target",
        ),
        pytest.param(
            referring("choice-4"),
            {"targetRef": {"kind": "StatefulSet"}},
            "spec.targetRef is immutable; create another workload",
            id="to a target of another kind",
        ),
        pytest.param(
            templated("choice-5"),
            {"models": []},
            "spec.models must name at least one model when spec.template is used",
            id="to no model at all",
        ),
    ],
)
def test_a_stored_workload_does_not_change(
    api: RawApi, stored: dict[str, Any], patch: dict[str, Any], message: str
) -> None:
    api.create(GMW, stored).accepted()
    assert message in api.merge(GMW, stored["metadata"]["name"], {"spec": patch}).refusal()


def test_a_stored_workload_changes_in_everything_else(api: RawApi) -> None:
    api.create(GMW, templated("changing")).accepted()
    patch = {
        "template": {"replicas": 3, "image": "registry.example/agent:2"},
        "models": [{**WHISPER, "name": "other"}],
        "restart": {"schedule": "@daily", "residual": {"threshold": "4Gi"}},
    }
    changed = api.merge(GMW, "changing", {"spec": patch}).accepted()
    assert changed["metadata"]["generation"] == 2
    assert changed["spec"]["template"]["replicas"] == 3
    assert changed["spec"]["restart"]["residual"]["minSamples"] == 3
