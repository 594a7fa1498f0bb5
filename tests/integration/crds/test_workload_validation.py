"""Which GPUModelWorkloads the apiserver takes, and what it says to the others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.crds.conftest import RawApi
from tests.integration.crds.objects import WHISPER, referring, restarting, serving, templated

pytestmark = pytest.mark.control_plane

GMW = "gpumodelworkloads"
ANYTIME = {"schedule": "0 1 * * *", "durationSeconds": 14400}


@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(referring(), id="a reference needs no models"),
        pytest.param(referring(models=[WHISPER]), id="a reference may push models"),
        pytest.param(referring("name.with.dots"), id="a reference may have dots in its name"),
        pytest.param(
            referring(targetRef={"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "a"}),
            id="a StatefulSet can be referred to",
        ),
        pytest.param(templated(), id="a template needs no fields of its own"),
        pytest.param(templated("a" * 63), id="a name of 63 characters is the longest"),
        pytest.param(
            templated(template={"gpu": {"count": 0}, "replicas": 0}), id="no GPU and no replica"
        ),
        pytest.param(
            templated(template={"gpu": {"resource": "nvidia.com/mig-1g.10gb"}}), id="a MIG slice"
        ),
        pytest.param(
            templated(
                template={
                    "spec": {
                        "tolerations": [{"operator": "Exists"}],
                        "containers": [
                            {"name": "agent", "resources": {"limits": {"memory": "8Gi"}}}
                        ],
                    },
                    "metadata": {"labels": {"team": "speech"}, "annotations": {"a.b/c": "d"}},
                }
            ),
            id="any part of a PodSpec can be given",
        ),
        pytest.param(
            serving(options={"dtype": "float16", "nested": {"list": [1, {"a": None}]}}),
            id="options are free-form",
        ),
        pytest.param(serving(options={"loadsOn": "cpu"}), id="loading on the CPU has every tier"),
        pytest.param(
            serving(
                runtime="Python", options={"loadsOn": "cuda"}, residency={"idleTier": "PinnedHost"}
            ),
            id="loading on CUDA with pinned memory",
        ),
        pytest.param(
            serving(
                runtime="Python",
                options={"loadsOn": "cuda"},
                residency={"offloadTier": "Disk", "idleTier": "Disk"},
            ),
            id="loading on CUDA with nothing kept",
        ),
        pytest.param(
            templated(
                models=[{**WHISPER, "name": f"model-{n}", "source": "x" * 1024} for n in range(64)],
                restart={"windows": [ANYTIME] * 16},
            ),
            id="as many models and windows as there may be",
        ),
        pytest.param(serving(vram="3Gi", device="0", priority=-5), id="placement by hand"),
        pytest.param(serving(vram="", group="", device=""), id="empty is the same as absent"),
        pytest.param(
            templated(vram={"dirty": {"above": "2Gi", "policy": "Wait"}}),
            id="a dirty device is waited for",
        ),
        pytest.param(restarting(schedule="0 3 * * *", timeZone="Asia/Shanghai"), id="every night"),
        pytest.param(restarting(schedule=""), id="an empty schedule is none"),
        pytest.param(restarting(schedule="@daily"), id="a schedule by its nickname"),
        pytest.param(restarting(schedule="*/15 0-6,22 1,15 JAN-MAR MON#1"), id="every cron sign"),
        pytest.param(
            restarting(timeZone="America/Argentina/Buenos_Aires"), id="a time zone of three parts"
        ),
        pytest.param(restarting(timeZone="Etc/GMT+8"), id="a time zone with a sign"),
        pytest.param(restarting(residual={"threshold": "8Gi"}), id="a residual threshold alone"),
        pytest.param(restarting(windows=[ANYTIME]), id="a window without a time zone"),
        pytest.param(restarting(maxUnavailable=3), id="several pods at once"),
        pytest.param(restarting(maxUnavailable="25%"), id="a share of the pods at once"),
        pytest.param(restarting(cooldownSeconds=630), id="the shortest cooldown in place"),
        pytest.param(
            restarting(method="Evict", cooldownSeconds=0), id="no cooldown between evictions"
        ),
        pytest.param(
            restarting(method="Recycle", cooldownSeconds=60), id="a short one between recycles"
        ),
    ],
)
def test_is_accepted(api: RawApi, workload: dict[str, Any]) -> None:
    assert api.try_create(GMW, workload).accepted()["spec"] is not None


CRON_MESSAGE = "spec.restart.schedule in body should match"
CUDA_MESSAGE = (
    "a model with options.loadsOn cuda keeps no copy in shared host memory: set "
    "residency.offloadTier and residency.idleTier (Host unless set) to PinnedHost or Disk"
)
COOLDOWN_MESSAGE = "cooldownSeconds must be at least 630 with the methods Auto and InPlace"


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        pytest.param(
            referring(targetRef=None),
            "set exactly one of spec.targetRef and spec.template",
            id="neither a reference nor a template",
        ),
        pytest.param(
            templated(targetRef={"kind": "Deployment", "name": "a"}),
            "set exactly one of spec.targetRef and spec.template",
            id="both a reference and a template",
        ),
        pytest.param(
            templated(models=None),
            "spec.models must name at least one model when spec.template is used",
            id="a template without models",
        ),
        pytest.param(
            templated(models=[]),
            "spec.models must name at least one model when spec.template is used",
            id="a template with an empty list of models",
        ),
        pytest.param(
            templated(models=[WHISPER, WHISPER]),
            'spec.models[1]: Duplicate value: {"name":"whisper"}',
            id="two models of one name",
        ),
        pytest.param(
            templated(models=[{**WHISPER, "name": f"model-{n}"} for n in range(65)]),
            "spec.models: Too many: 65: must have at most 64 items",
            id="more models than there may be",
        ),
        pytest.param(
            referring(targetRef={"kind": "DaemonSet", "name": "a"}),
            'spec.targetRef.kind: Unsupported value: "DaemonSet": supported values: '
            '"Deployment", "StatefulSet"',
            id="a reference to a DaemonSet",
        ),
        pytest.param(
            referring(targetRef={"apiVersion": "v1", "kind": "Deployment", "name": "a"}),
            'spec.targetRef.apiVersion: Unsupported value: "v1": supported values: "apps/v1"',
            id="a reference of another version",
        ),
        pytest.param(
            referring(targetRef={"kind": "Deployment"}),
            "spec.targetRef.name: Required value",
            id="a reference without a name",
        ),
        pytest.param(
            referring("a" * 64),
            "metadata.name must have at most 63 characters: it is the value of vram.dev/workload",
            id="a name that is too long for a label",
        ),
        pytest.param(
            templated("1st"),
            "metadata.name must be lower-case letters, digits and '-', and begin with a letter, "
            "when spec.template is used: a Service gets this name",
            id="a template whose name is none for a Service",
        ),
        pytest.param(
            templated("with.dots"),
            "a Service gets this name",
            id="a template with dots in its name",
        ),
        pytest.param(
            templated(template={"replicas": -1}),
            "spec.template.replicas in body should be greater than or equal to 0",
            id="less than no replica",
        ),
        pytest.param(
            templated(template={"gpu": {"resource": "gpu"}}),
            "spec.template.gpu.resource in body should match",
            id="a GPU that is no extended resource",
        ),
        pytest.param(
            templated(template={"gpu": {"count": 1.5}}),
            "spec.template.gpu.count in body must be of type integer",
            id="half a GPU",
        ),
        pytest.param(
            templated(template={"resources": {}}),
            'unknown field "spec.template.resources"',
            id="a field beside the partial PodSpec",
        ),
        pytest.param(
            serving(name="Whisper"),
            "spec.models[0].name in body should match",
            id="a model name with capitals",
        ),
        pytest.param(
            serving(name="a" * 64), "may not be more than 63", id="a model name that is too long"
        ),
        pytest.param(
            serving(runtime="vLLM"),
            'spec.models[0].runtime: Unsupported value: "vLLM": supported values: "Whisper", '
            '"FunASR", "ONNX", "Torch", "Transformers", "Python"',
            id="an unknown runtime",
        ),
        pytest.param(
            serving(source=""),
            "spec.models[0].source in body should be at least 1 chars long",
            id="a model from nowhere",
        ),
        pytest.param(
            serving(vram="3 Gi"),
            "spec.models[0].vram in body should match",
            id="a quantity with a space",
        ),
        pytest.param(
            serving(vram="-1Gi"), "spec.models[0].vram in body should match", id="less than nothing"
        ),
        pytest.param(
            templated(vram={"dirty": {"policy": "Ignore"}}),
            'spec.vram.dirty.policy: Unsupported value: "Ignore": supported values: "Report", '
            '"Wait", "Refuse"',
            id="an unknown word for a dirty device",
        ),
        pytest.param(
            serving(device="cuda:0"),
            "spec.models[0].device in body should match",
            id="a device by another name than its index",
        ),
        pytest.param(
            serving(residency={"load": "Sometimes"}),
            'spec.models[0].residency.load: Unsupported value: "Sometimes"',
            id="an unknown way to load",
        ),
        pytest.param(
            serving(residency={"idleTier": "VRAM"}),
            'spec.models[0].residency.idleTier: Unsupported value: "VRAM": supported values: '
            '"PinnedHost", "Host", "Disk"',
            id="VRAM is no tier to sink to",
        ),
        pytest.param(
            serving(residency={"idleTimeoutSeconds": -1}),
            "should be greater than or equal to 0",
            id="idle for less than no time",
        ),
        pytest.param(
            serving(residency={"keepAlive": 1}),
            'unknown field "spec.models[0].residency.keepAlive"',
            id="an unknown field of residency",
        ),
        pytest.param(
            serving(options={"loadsOn": "cuda"}),
            CUDA_MESSAGE,
            id="loading on CUDA with the default tier at idle",
        ),
        pytest.param(
            serving(
                options={"loadsOn": "cuda"}, residency={"idleTier": "Disk", "offloadTier": "Host"}
            ),
            CUDA_MESSAGE,
            id="loading on CUDA with shared host memory after a task",
        ),
        pytest.param(
            referring(queue={"maxDepth": 0}),
            "spec.queue.maxDepth in body should be greater than or equal to 1",
            id="a queue without a place",
        ),
        pytest.param(restarting(schedule="0 3 * *"), CRON_MESSAGE, id="a schedule of four fields"),
        pytest.param(
            restarting(schedule="0 0 3 * * *"), CRON_MESSAGE, id="a schedule with seconds"
        ),
        pytest.param(restarting(schedule="@reboot"), CRON_MESSAGE, id="an unknown nickname"),
        pytest.param(
            restarting(schedule="TZ=Asia/Tokyo 0 3 * * *"),
            CRON_MESSAGE,
            id="a time zone inside of the schedule",
        ),
        pytest.param(
            restarting(schedule="0 3 * * " + "1," * 80),
            "spec.restart.schedule: Too long: may not be more than 128",
            id="a schedule without end",
        ),
        pytest.param(
            restarting(timeZone="../etc/passwd"),
            "spec.restart.timeZone in body should match",
            id="a time zone that is a path",
        ),
        pytest.param(
            restarting(timeZone="Local"),
            "name an IANA time zone such as Asia/Shanghai, or Etc/UTC",
            id="the time zone of some machine",
        ),
        pytest.param(
            restarting(residual={}),
            "spec.restart.residual.threshold: Required value",
            id="a residual policy without a threshold",
        ),
        pytest.param(
            restarting(residual={"threshold": "0"}),
            "residual.threshold must be above zero; leave restart.residual out to have no residual "
            "restarts",
            id="a residual of nothing",
        ),
        pytest.param(
            restarting(residual={"threshold": "0.0Gi"}),
            "residual.threshold must be above zero",
            id="a residual of nothing in other words",
        ),
        pytest.param(
            restarting(residual={"threshold": ""}),
            "spec.restart.residual.threshold in body should be at least 1 chars long",
            id="an empty residual threshold",
        ),
        pytest.param(
            restarting(residual={"threshold": "8Gi", "minSamples": 0}),
            "spec.restart.residual.minSamples in body should be greater than or equal to 1",
            id="a restart on no evidence",
        ),
        pytest.param(
            restarting(windows=[{"schedule": "0 1 * * *"}]),
            "spec.restart.windows[0].durationSeconds: Required value",
            id="a window without an end",
        ),
        pytest.param(
            restarting(windows=[{**ANYTIME, "schedule": ""}]),
            "spec.restart.windows[0].schedule in body should",
            id="a window without a beginning",
        ),
        pytest.param(
            restarting(windows=[ANYTIME] * 17),
            "spec.restart.windows: Too many: 17: must have at most 16 items",
            id="too many windows",
        ),
        pytest.param(
            restarting(method="Reboot"),
            'spec.restart.method: Unsupported value: "Reboot": supported values: "Auto", '
            '"Recycle", "InPlace", "Evict", "Delete"',
            id="an unknown method",
        ),
        pytest.param(
            restarting(maxUnavailable=0),
            "spec.restart.maxUnavailable in body should be greater than or equal to 1",
            id="no pod may be unavailable",
        ),
        pytest.param(
            restarting(maxUnavailable="0%"),
            "spec.restart.maxUnavailable in body should match",
            id="no share may be unavailable",
        ),
        pytest.param(
            restarting(maxUnavailable="101%"),
            "spec.restart.maxUnavailable in body should match",
            id="more than all may be unavailable",
        ),
        pytest.param(
            restarting(cooldownSeconds=629), COOLDOWN_MESSAGE, id="a cooldown below the back-off"
        ),
        pytest.param(
            restarting(method="InPlace", cooldownSeconds=0),
            COOLDOWN_MESSAGE,
            id="no cooldown in place",
        ),
        pytest.param(
            referring(restarts={}), 'unknown field "spec.restarts"', id="a misspelt section"
        ),
    ],
)
def test_is_refused_with_a_message(api: RawApi, workload: dict[str, Any], message: str) -> None:
    assert message in api.try_create(GMW, workload).refusal()


def test_an_object_without_a_spec_is_refused(api: RawApi) -> None:
    workload = referring()
    del workload["spec"]
    assert "spec: Required value" in api.try_create(GMW, workload).refusal()
