"""What the apiserver fills in; the same figures as in the documentation."""

from __future__ import annotations

import pytest

from tests.integration.crds.conftest import RawApi
from tests.integration.crds.objects import pod_restart, referring, restarting, templated

pytestmark = pytest.mark.control_plane

RESTART_DEFAULTS = {
    "timeZone": "Etc/UTC",
    "startingDeadlineSeconds": 3600,
    "suspend": False,
    "method": "Auto",
    "maxUnavailable": 1,
    "drainTimeoutSeconds": 300,
    "cooldownSeconds": 660,
    "maxConsecutiveFailures": 3,
    "dryRun": False,
}


def test_a_reference_gets_every_default_and_nothing_that_was_not_asked_for(api: RawApi) -> None:
    assert api.try_create("gpumodelworkloads", referring()).accepted()["spec"] == {
        "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "step-audio"},
        "vram": {"headroom": "512Mi"},
        "hostMemory": {},
        "queue": {"maxDepth": 256, "timeoutSeconds": 300},
        "restart": RESTART_DEFAULTS,
    }


def test_a_template_gets_one_replica_with_one_gpu_and_a_lazy_model(api: RawApi) -> None:
    spec = api.try_create("gpumodelworkloads", templated()).accepted()["spec"]
    assert spec["template"] == {
        "replicas": 1,
        "gpu": {"resource": "nvidia.com/gpu", "count": 1},
        "metadata": {},
    }
    assert spec["models"] == [
        {
            "name": "whisper",
            "runtime": "Whisper",
            "source": "/models/large-v3.pt",
            "priority": 0,
            "residency": {
                "load": "Lazy",
                "afterTask": "Offload",
                "offloadTier": "PinnedHost",
                "idleTimeoutSeconds": 600,
                "idleTier": "Host",
            },
        }
    ]


def test_a_residual_policy_and_a_window_get_their_defaults_once_they_are_there(api: RawApi) -> None:
    windows = [{"schedule": "0 1 * * *", "durationSeconds": 14400}]
    workload = restarting(residual={"threshold": "8Gi"}, windows=windows)
    restart = api.try_create("gpumodelworkloads", workload).accepted()["spec"]["restart"]
    assert restart["residual"] == {"threshold": "8Gi", "forSeconds": 60, "minSamples": 3}
    assert restart["windows"] == [
        {"schedule": "0 1 * * *", "timeZone": "Etc/UTC", "durationSeconds": 14400}
    ]


def test_a_policy_for_dirty_devices_gets_its_defaults_once_it_is_there(api: RawApi) -> None:
    workload = templated(vram={"dirty": {"policy": "Wait"}})
    spec = api.try_create("gpumodelworkloads", workload).accepted()["spec"]
    assert spec["vram"] == {"headroom": "512Mi", "dirty": {"above": "1Gi", "policy": "Wait"}}


def test_a_restart_by_hand_is_manual_and_automatic(api: RawApi) -> None:
    assert api.try_create("gpupodrestarts", pod_restart()).accepted()["spec"] == {
        "workload": "speech",
        "pod": {"name": "speech-6c9f-abcde"},
        "trigger": "Manual",
        "method": "Auto",
        "drainTimeoutSeconds": 300,
    }
