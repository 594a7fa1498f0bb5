"""Smallest accepted objects, with what a test wants to differ."""

from __future__ import annotations

from typing import Any

WHISPER = {"name": "whisper", "runtime": "Whisper", "source": "/models/large-v3.pt"}
TARGET = {"kind": "Deployment", "name": "step-audio"}


def referring(name: str = "speech", **spec: Any) -> dict[str, Any]:
    """A workload that refers to someone else's Deployment."""
    return _workload(name, {"targetRef": TARGET, **spec})


def templated(name: str = "speech", **spec: Any) -> dict[str, Any]:
    """A workload whose pods the operator runs."""
    return _workload(name, {"template": {}, "models": [WHISPER], **spec})


def serving(**model: Any) -> dict[str, Any]:
    """A workload of one model with these fields."""
    return templated(models=[{**WHISPER, **model}])


def restarting(**restart: Any) -> dict[str, Any]:
    """A workload with this restart policy."""
    return referring(restart=restart)


def pod_restart(name: str = "speech-1a2b3c4d5e", **spec: Any) -> dict[str, Any]:
    """A manual restart."""
    return {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "GPUPodRestart",
        "metadata": {"name": name},
        "spec": {"workload": "speech", "pod": {"name": "speech-6c9f-abcde"}, **spec},
    }


def _workload(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "GPUModelWorkload",
        "metadata": {"name": name},
        "spec": {key: value for key, value in spec.items() if value is not None},
    }
