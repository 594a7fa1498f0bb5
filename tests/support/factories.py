"""Frozen values of the operator's core for tests: sensible as they are, each field open to change.

By default they tell of workload ``speech`` in namespace ``lab``: one pod on one node,
accepted and rolled out, its agent quiet with a residual of 1 GiB.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec import structs
from vram_agent.protocol import (
    ActionReport,
    ActionState,
    ActionStep,
    AgentIdentity,
    AgentMode,
    DeviceKind,
    DeviceReport,
    MemoryClasses,
    MemoryReport,
    ModelReport,
    ModelSpec,
    ModelState,
    PodIdentity,
    Report,
    ResidualSource,
    Runtime,
    Tier,
)
from vram_operator.api import (
    WORKLOAD_LABEL,
    PodRef,
    PodTemplate,
    ResidualPolicy,
    RestartMethod,
    RestartPolicy,
    RestartSpec,
    RestartStatus,
    RestartTrigger,
    TargetKind,
    TargetRef,
    WorkloadSpec,
    WorkloadStatus,
)
from vram_operator.core.resources import (
    CONTENT_HASH_ANNOTATION,
    content_hash,
    make_config_map,
    make_service,
    make_trust_config_map,
    template_hash,
)
from vram_operator.core.snapshot import (
    Agent,
    Cluster,
    EvictionAnswer,
    EvictionVerdict,
    OwnedObject,
    Pod,
    ResidualSample,
    Restart,
    Settings,
    Snapshot,
    Target,
    Workload,
    hear,
)

GIB = 1024**3
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=30)
PUBLIC_KEYS = "-----BEGIN PUBLIC KEY-----\n"


def ago(seconds: float, now: datetime = NOW) -> datetime:
    """A moment so many seconds before now."""
    return now - timedelta(seconds=seconds)


def rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def make_policy(**fields: Any) -> RestartPolicy:
    """A restart policy with a residual threshold of 8 GiB; ``residual=None`` for none."""
    residual = ResidualPolicy(threshold="8Gi", for_seconds=60, min_samples=3)
    return RestartPolicy(**{"residual": residual, **fields})


def make_template_spec(**fields: Any) -> WorkloadSpec:
    """A spec in template mode."""
    models = [ModelSpec(name="whisper", runtime=Runtime.WHISPER, source="/models/tiny.pt")]
    return WorkloadSpec(
        **{
            "template": PodTemplate(replicas=1),
            "models": models,
            "restart": make_policy(),
            **fields,
        }
    )


def make_reference_spec(**fields: Any) -> WorkloadSpec:
    """A spec in reference mode."""
    ref = TargetRef(kind=TargetKind.DEPLOYMENT, name="step-audio")
    return WorkloadSpec(**{"target_ref": ref, "restart": make_policy(), **fields})


def make_workload(**fields: Any) -> Workload:
    return Workload(
        **{
            "namespace": "lab",
            "name": "speech",
            "uid": "workload-uid",
            "generation": 3,
            "resource_version": "100",
            "created": LONG_AGO,
            "spec": make_template_spec(),
            "status": WorkloadStatus(),
            **fields,
        }
    )


def make_pod(name: str = "speech-a", **fields: Any) -> Pod:
    return Pod(
        **{
            "name": name,
            "uid": f"uid-{name}",
            "resource_version": "7",
            "created": LONG_AGO,
            "ip": "10.0.0.1",
            "node": f"node-of-{name}",
            "ready": True,
            "ready_changed_at": LONG_AGO,
            "agent_running_since": LONG_AGO,
            "control_port": 8001,
            "owner_kind": "ReplicaSet",
            "owner_name": "speech-6c9f",
            "labels": {WORKLOAD_LABEL: "speech"},
            **fields,
        }
    )


def make_model(**fields: Any) -> ModelReport:
    return ModelReport(
        **{
            "name": "whisper",
            "runtime": Runtime.WHISPER,
            "state": ModelState.OFFLOADED,
            "tier": Tier.HOST,
            "vram_bytes": 0,
            "host_bytes": GIB,
            "in_flight": 0,
            "queued": 0,
            **fields,
        }
    )


def make_report(pod: Pod, residual_gib: float = 1.0, at: datetime = NOW, **fields: Any) -> Report:
    """A report that was observed at a moment; ``boot_id``, ``epoch`` and ``source`` are fields."""
    residual = int(residual_gib * GIB)
    source = fields.pop("source", ResidualSource.EXCLUSIVE)
    context = fields.pop("context_bytes", 0)
    identity = AgentIdentity(
        version="0.1.0",
        mode=fields.pop("mode", AgentMode.SERVE),
        boot_id=fields.pop("boot_id", f"boot-{pod.name}"),
        epoch=fields.pop("epoch", 0),
        started_at=rfc3339(LONG_AGO),
        pod=PodIdentity(namespace="lab", name=pod.name, uid=pod.uid),
    )
    memory = MemoryReport(
        source=source,
        used_bytes=residual,
        model_bytes=0,
        residual_bytes=residual,
        host_bytes=GIB,
        classes=MemoryClasses(context_and_libraries=context, unattributed=residual - context),
    )
    device = DeviceReport(
        uuid="GPU-1",
        index=0,
        kind=DeviceKind.CUDA,
        total_bytes=80 * GIB,
        used_bytes=residual,
        exclusive=True,
    )
    return Report(
        **{
            "agent": identity,
            "sequence": 1,
            "observed_at": rfc3339(at),
            "config_generation": 3,
            "devices": [device],
            "memory": memory,
            "models": [make_model()],
            "idle": True,
            "idle_since": rfc3339(LONG_AGO),
            "draining": False,
            **fields,
        }
    )


def make_sample(age_seconds: float, residual_gib: float = 9.0, **fields: Any) -> ResidualSample:
    """A quiet sample that was observed and received so long ago."""
    return ResidualSample(
        **{
            "boot_id": "boot-speech-a",
            "epoch": 0,
            "observed_at": ago(age_seconds),
            "received_at": ago(age_seconds),
            "residual_bytes": int(residual_gib * GIB),
            "context_bytes": 0,
            "source": ResidualSource.EXCLUSIVE,
            "idle": True,
            "in_flight": 0,
            "moving": False,
            **fields,
        }
    )


def make_agent(pod: Pod, residual_gib: float = 1.0, now: datetime = NOW, **fields: Any) -> Agent:
    """An agent that reported every ten seconds for two minutes, the last time just now."""
    names = ("push", "calls", "refuses", "refused_at", "error")
    of_agent = {name: fields.pop(name) for name in names if name in fields}
    report = make_report(pod, residual_gib, now, **fields)
    agent = Agent(pod_uid=pod.uid)
    for seconds in range(120, -1, -10):
        moment = ago(seconds, now)
        agent = hear(agent, structs.replace(report, observed_at=rfc3339(moment)), moment, 600)
    return replace(agent, report=report, **of_agent)


def make_action(
    restart_id: str, state: ActionState = ActionState.DONE, at: datetime = NOW, **fields: Any
) -> ActionReport:
    values = {"step": ActionStep.RECYCLE, **fields}
    return ActionReport(restart_id=restart_id, state=state, at=rfc3339(at), **values)


def make_restart(pod: Pod, **fields: Any) -> Restart:
    """A queued Residual restart of a pod, decided ten seconds ago; spec fields by their names."""
    spec_names = (
        "trigger",
        "method",
        "scheduled_time",
        "drain_timeout_seconds",
        "reason",
        "workload",
    )
    spec = {name: fields.pop(name) for name in spec_names if name in fields}
    name = fields.pop("name", f"speech-{pod.name}")
    return Restart(
        **{
            "name": name,
            "uid": f"uid-{name}",
            "resource_version": "50",
            "created": ago(10),
            "spec": RestartSpec(
                **{
                    "workload": "speech",
                    "pod": fields.pop("pod_ref", PodRef(name=pod.name, uid=pod.uid)),
                    "trigger": RestartTrigger.RESIDUAL,
                    "method": RestartMethod.AUTO,
                    "reason": "residual 9Gi above 8Gi",
                    **spec,
                }
            ),
            "status": RestartStatus(),
            "annotations": {"vram.dev/workload-generation": "3"},
            **fields,
        }
    )


def make_target(workload: Workload, **fields: Any) -> Target:
    """The target, rolled out; owned and applied in template mode, labelled in both."""
    template, ref = workload.spec.template, workload.spec.target_ref
    replicas = fields.get("replicas", template.replicas if template is not None else 1)
    return Target(
        **{
            "kind": "Deployment" if ref is None else str(ref.kind),
            "name": workload.name if ref is None else ref.name,
            "uid": "target-uid",
            "generation": 2,
            "observed_generation": 2,
            "replicas": replicas,
            "current": replicas,
            "updated": replicas,
            "available": replicas,
            "selector": f"{WORKLOAD_LABEL}={workload.name}",
            "owner_uid": workload.uid if template is not None else "",
            "annotations": {}
            if template is None
            else {CONTENT_HASH_ANNOTATION: template_hash(template)},
            "template_labels": {WORKLOAD_LABEL: workload.name},
            **fields,
        }
    )


def make_answer(
    pod: Pod, verdict: EvictionVerdict = EvictionVerdict.ALLOWED, **fields: Any
) -> EvictionAnswer:
    """The Eviction API's answer of just now."""
    return EvictionAnswer(**{"pod_uid": pod.uid, "at": NOW, "verdict": verdict, **fields})


def make_settings(**fields: Any) -> Settings:
    return Settings(
        **{
            "agent_image": "registry.example/vram-agent:1",
            "max_concurrent_restarts": "100%",
            "schedule_jitter_seconds": 0,
            **fields,
        }
    )


def make_snapshot(**fields: Any) -> Snapshot:
    """A snapshot in which all is as it should be; objects of template mode are applied."""
    workload = fields.pop("workload", None) or make_workload()
    pods = fields.pop("pods", None)
    pods = (make_pod(),) if pods is None else pods
    template = workload.spec.template
    if template is not None and template.replicas != len(pods):
        template = structs.replace(template, replicas=len(pods))
        spec = structs.replace(workload.spec, template=template)
        workload = replace(workload, spec=spec)
    snapshot = Snapshot(
        **{
            "settings": make_settings(),
            "cluster": Cluster(total_pods=len(pods)),
            "workload": workload,
            "public_keys": PUBLIC_KEYS,
            "target": make_target(workload, replicas=len(pods)),
            "pods": pods,
            "agents": tuple(make_agent(pod) for pod in pods),
            **fields,
        }
    )
    if "objects" in fields:
        return snapshot
    return with_objects(snapshot)


def with_objects(snapshot: Snapshot) -> Snapshot:
    """The snapshot with trust ConfigMap, and in template mode Service and ConfigMap, applied."""
    workload = snapshot.workload
    manifests = [make_trust_config_map(snapshot)]
    if workload.spec.template is not None:
        manifests += [make_config_map(workload), make_service(workload)]
    objects = tuple(
        OwnedObject(
            kind=manifest["kind"],
            name=manifest["metadata"]["name"],
            owner_uid=workload.uid if manifest["metadata"].get("ownerReferences") else "",
            content_hash=content_hash(manifest),
        )
        for manifest in manifests
    )
    return replace(snapshot, objects=objects)
