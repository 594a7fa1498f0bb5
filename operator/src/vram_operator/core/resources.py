"""The objects of a workload in template mode, and the trust ConfigMap of its namespace.

Why it exists: everything that the operator applies is built here from the snapshot alone, so that
the same workload always gives the same manifests. Called by ``upkeep``. It knows no client.

Placement that later readers ask for:

* Config changes do not roll the Deployment: the template carries no hash of the config, running
  agents are sent it (``PUT /config``) and new ones read the ConfigMap.
* A new operator does not roll it either: the Deployment is applied again only when
  :func:`template_hash` changes, which covers what the user wrote and nothing that we generate.
* ``kubectl rollout restart`` keeps its annotation, since we never own it.
* Offloaded weights lie in a memfd: shared memory that counts towards the pod's memory limit. So
  no tmpfs volume is mounted for them, and the limit in ``template.spec`` has to leave room.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from msgspec import structs, to_builtins
from vram_agent.protocol import (
    CONTROL_PORT,
    DEFAULT_PUBLIC_KEY_FILE,
    SERVING_PORT,
    STATE_DIRECTORY,
    AgentConfig,
    ConfigMetadata,
    DevicePreference,
    DrainPolicy,
)

from vram_operator.api import (
    AGENT_CONTAINER,
    API_VERSION,
    TRUST_CONFIG_MAP,
    TRUST_KEY,
    WORKLOAD_KIND,
    WORKLOAD_LABEL,
    PodTemplate,
)
from vram_operator.core.podspec import merge_pod_spec
from vram_operator.core.snapshot import Snapshot, Workload
from vram_operator.core.sparse import encode_sparsely

CONTENT_HASH_ANNOTATION = "vram.dev/content-hash"
"""What was applied last: on Service and ConfigMap all of it, on the Deployment the user's part."""
SCALE_FIELD_MANAGER = "vram-operator-scale"
"""Owns ``spec.replicas`` of the Deployment after its creation, and nothing else."""
CONFIG_KEY = "config.yaml"
CONFIG_DIRECTORY = "/etc/vram-agent-config"
NON_ROOT_ID = 65_532
GRACE_SECONDS = 30
GRACE_MARGIN_SECONDS = 5
"""The agent's drain ends so long before the kubelet kills it."""

_TRUST_DIRECTORY = DEFAULT_PUBLIC_KEY_FILE.rsplit("/", 1)[0]


def make_agent_config(workload: Workload) -> AgentConfig:
    """Return the config for the workload's agents; its generation is the workload's."""
    spec, template = workload.spec, workload.spec.template
    on_cpu = template is not None and template.gpu.count == 0
    return AgentConfig(
        metadata=ConfigMetadata(generation=workload.generation),
        models=list(spec.models),
        vram=spec.vram,
        host_memory=spec.host_memory,
        queue=spec.queue,
        device=DevicePreference.CPU if on_cpu else DevicePreference.AUTO,
        drain=DrainPolicy(grace_seconds=_drain_grace_seconds(template)),
    )


def make_pushed_config(workload: Workload) -> AgentConfig:
    """Return the config for agents that run: without what belongs to their process and pod.

    An agent keeps its own where the config leaves a default. What it cannot take while it runs
    (``device``), and what its pod was not made for (``drain``), comes with the next pod.
    """
    return structs.replace(
        make_agent_config(workload), device=DevicePreference.AUTO, drain=DrainPolicy()
    )


def config_document(config: AgentConfig) -> dict[str, Any]:
    """Return a config as an agent of any version reads it: only what somebody set."""
    # apiVersion and kind are defaults and would stay unwritten; a reader looks for them first.
    return {"apiVersion": config.api_version, "kind": config.kind, **encode_sparsely(config)}


def make_config_map(workload: Workload) -> dict[str, Any]:
    """Return the ConfigMap that holds the agents' config."""
    document = config_document(make_agent_config(workload))
    manifest = _owned(workload, "v1", "ConfigMap")
    manifest["data"] = {CONFIG_KEY: json.dumps(document, indent=2) + "\n"}
    return _stamped(manifest)


def make_service(workload: Workload) -> dict[str, Any]:
    """Return the Service before the agents: ``http`` and ``control``."""
    manifest = _owned(workload, "v1", "Service")
    manifest["spec"] = {
        "selector": {WORKLOAD_LABEL: workload.name},
        "ports": [
            {"name": "http", "port": SERVING_PORT, "targetPort": "http", "protocol": "TCP"},
            {"name": "control", "port": CONTROL_PORT, "targetPort": "control", "protocol": "TCP"},
        ],
    }
    return _stamped(manifest)


def make_deployment(workload: Workload, template: PodTemplate, image: str) -> dict[str, Any]:
    """Return the whole Deployment. Raises InvalidTemplateError for a template.spec that is none.

    ``maxSurge: 0``, since a second pod would wait for the GPU that the first one holds.
    """
    manifest = _owned(workload, "apps/v1", "Deployment")
    manifest["metadata"]["annotations"] = {CONTENT_HASH_ANNOTATION: template_hash(template)}
    selector = {WORKLOAD_LABEL: workload.name}
    metadata: dict[str, Any] = {"labels": {**template.metadata.labels, **selector}}
    if template.metadata.annotations:
        metadata["annotations"] = dict(template.metadata.annotations)
    manifest["spec"] = {
        "replicas": template.replicas,
        "selector": {"matchLabels": selector},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
        },
        "template": {
            "metadata": metadata,
            "spec": merge_pod_spec(_generated_pod_spec(workload, template, image), template.spec),
        },
    }
    return manifest


def make_scale(workload: Workload, template: PodTemplate) -> dict[str, Any]:
    """Return the part of the Deployment that scales it and rolls nothing."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": workload.name, "namespace": workload.namespace},
        "spec": {"replicas": template.replicas},
    }


def make_trust_config_map(snapshot: Snapshot) -> dict[str, Any]:
    """Return the namespace's ConfigMap with the operator's public keys; it has no one owner."""
    manifest: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": TRUST_CONFIG_MAP,
            "namespace": snapshot.workload.namespace,
            "labels": {"app.kubernetes.io/managed-by": "vram-operator"},
        },
        "data": {TRUST_KEY: snapshot.public_keys},
    }
    return _stamped(manifest)


def template_hash(template: PodTemplate) -> str:
    """Return a hash of what the user wrote of the pods: all of the template but its replicas."""
    return _hash(encode_sparsely(structs.replace(template, replicas=1)))


def is_hash_of(written: str | None, template: PodTemplate) -> bool:
    """Is this what was written of the template when it was applied, by this build or the first?

    Those hashed nested objects that nobody had set too; their Deployments are not rolled for it.
    """
    first = _hash(to_builtins(structs.replace(template, replicas=1)))
    return written in {template_hash(template), first}


def content_hash(manifest: dict[str, Any]) -> str:
    """Return the hash that a stamped manifest carries."""
    return str(manifest["metadata"]["annotations"][CONTENT_HASH_ANNOTATION])


def owner_reference(workload: Workload) -> dict[str, Any]:
    """Return the reference that lets the garbage collector follow the workload."""
    return {
        "apiVersion": API_VERSION,
        "kind": WORKLOAD_KIND,
        "name": workload.name,
        "uid": workload.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _drain_grace_seconds(template: PodTemplate | None) -> int:
    grace = (
        GRACE_SECONDS
        if template is None
        else template.spec.get("terminationGracePeriodSeconds", GRACE_SECONDS)
    )
    return max(0, (grace if isinstance(grace, int) else GRACE_SECONDS) - GRACE_MARGIN_SECONDS)


def _owned(workload: Workload, api_version: str, kind: str) -> dict[str, Any]:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": workload.name,
            "namespace": workload.namespace,
            "labels": {
                WORKLOAD_LABEL: workload.name,
                "app.kubernetes.io/managed-by": "vram-operator",
            },
            "ownerReferences": [owner_reference(workload)],
        },
    }


def _stamped(manifest: dict[str, Any]) -> dict[str, Any]:
    annotations = {CONTENT_HASH_ANNOTATION: _hash(manifest)}
    return {**manifest, "metadata": {**manifest["metadata"], "annotations": annotations}}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _generated_pod_spec(workload: Workload, template: PodTemplate, image: str) -> dict[str, Any]:
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": NON_ROOT_ID,
            "runAsGroup": NON_ROOT_ID,
            "fsGroup": NON_ROOT_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_agent_container(template, image)],
        "volumes": [
            {"name": "config", "configMap": {"name": workload.name}},
            {"name": "trust", "configMap": {"name": TRUST_CONFIG_MAP, "optional": True}},
            {"name": "state", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }


def _agent_container(template: PodTemplate, image: str) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": AGENT_CONTAINER,
        "image": image,
        "args": ["serve", "--config", f"{CONFIG_DIRECTORY}/{CONFIG_KEY}"],
        "env": [
            _downward("POD_NAME", "metadata.name"),
            _downward("POD_NAMESPACE", "metadata.namespace"),
            _downward("POD_UID", "metadata.uid"),
            _downward("NODE_NAME", "spec.nodeName"),
        ],
        "ports": [
            {"name": "http", "containerPort": SERVING_PORT, "protocol": "TCP"},
            {"name": "control", "containerPort": CONTROL_PORT, "protocol": "TCP"},
        ],
        # A recycle is back within three probes; a drain or exit is seen after three seconds.
        "readinessProbe": _probe("/readyz", {"periodSeconds": 1, "timeoutSeconds": 2}),
        "livenessProbe": _probe(
            "/healthz", {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6}
        ),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_DIRECTORY, "readOnly": True},
            {"name": "trust", "mountPath": _TRUST_DIRECTORY, "readOnly": True},
            {"name": "state", "mountPath": STATE_DIRECTORY},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the mount makes it private
        ],
    }
    if template.gpu.count:
        container["resources"] = {"limits": {template.gpu.resource: str(template.gpu.count)}}
    return container


def _downward(name: str, field_path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field_path}}}


def _probe(path: str, timing: dict[str, int]) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "control"}, **timing}
