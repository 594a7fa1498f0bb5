"""Workloads that the end-to-end tests apply. All but one run without the node's one GPU."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
LEAKY: Json = {
    "name": "leaky",
    "runtime": "Python",
    "source": "leaky:create",
    "options": {"path": "/models"},
    "residency": {"idleTimeoutSeconds": 0},
}
WHISPER: Json = {
    "name": "whisper",
    "runtime": "Whisper",
    "source": "/models/whisper-tiny-words.pt",
    "residency": {"idleTimeoutSeconds": 5},
}
DIGITS: Json = {"name": "digits", "runtime": "ONNX", "source": "/digits/spoken-digit.onnx"}


def workload(
    name: str, models: list[Json], restart: Json | None = None, *, gpu_count: int = 0
) -> Json:
    """A workload in template mode whose pod sees all models of the tests."""
    volumes = {"speech-models": "/models", "digit-models": "/digits"}
    return {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "GPUModelWorkload",
        "metadata": {"name": name},
        "spec": {
            "template": {
                "gpu": {"count": gpu_count},
                "spec": {
                    "containers": [
                        {
                            "name": "agent",
                            "resources": {"limits": {"memory": "4Gi"}},
                            "volumeMounts": [
                                {"name": volume, "mountPath": path}
                                for volume, path in volumes.items()
                            ],
                        }
                    ],
                    "volumes": [
                        {"name": volume, "configMap": {"name": volume}} for volume in volumes
                    ],
                },
            },
            "models": models,
            **({"restart": restart} if restart else {}),
        },
    }


def leak_request(megabytes: int) -> Json:
    """An inference that makes the leaky model keep so many megabytes for ever."""
    return {
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [41.0]}],
        "parameters": {"megabytes": megabytes},
    }
