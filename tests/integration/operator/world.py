"""What a test of the operator does and looks at, in the words of the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.integration.operator.client import APPS, CORE, VRAM, Client, Object, eventually
from tests.integration.operator.kubelet import Kubelet
from tests.integration.operator.processes import Operator

MODEL = {"name": "whisper", "runtime": "Whisper", "source": "/models/large-v3.pt"}
NAME = "speech"


def workload(**restart: Any) -> Object:
    """A workload of one pod that the operator runs, with this restart policy."""
    return {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "GPUModelWorkload",
        "metadata": {"name": NAME},
        "spec": {
            "template": {"replicas": 1, "gpu": {"count": 0}},
            "models": [MODEL],
            "restart": restart,
        },
    }


def manual_restart(name: str, pod: str, **spec: Any) -> Object:
    """A GPUPodRestart as a person writes it."""
    return {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "GPUPodRestart",
        "metadata": {"name": name},
        "spec": {"workload": NAME, "pod": {"name": pod}, **spec},
    }


def condition(obj: Object | None, kind: str) -> Object:
    """The condition of this type; empty while there is none."""
    found = ((obj or {}).get("status") or {}).get("conditions") or []
    return next((one for one in found if one["type"] == kind), {})


@dataclass
class World:
    """One namespace with its kubelet, and the way to start operators."""

    client: Client
    kubelet: Kubelet
    make: Callable[..., Operator]

    async def start(self, *flags: str, **options: Any) -> Operator:
        """Start an operator and wait until it leads."""
        operator = self.make(*flags, **options)
        await operator.start()
        await eventually(operator.is_ready, "the operator is ready", 60)
        return operator

    async def create(self, body: Object) -> Object:
        plural = {"GPUModelWorkload": "gpumodelworkloads", "GPUPodRestart": "gpupodrestarts"}
        created: Object = await self.client.create(VRAM, plural[body["kind"]], body)
        return created

    async def workload(self) -> Object | None:
        found: Object | None = await self.client.find(VRAM, "gpumodelworkloads", NAME)
        return found

    async def restarts(self) -> list[Object]:
        return await self.client.items(VRAM, "gpupodrestarts")

    async def pods(self) -> list[Object]:
        return await self.client.items(CORE, "pods")

    async def deployment(self) -> Object | None:
        found: Object | None = await self.client.find(APPS, "deployments", NAME)
        return found

    async def until_condition(self, kind: str, status: str, timeout_seconds: float = 60) -> Object:
        """Wait for a condition of the workload; returns the workload."""

        async def check() -> Object | None:
            found = await self.workload()
            return found if condition(found, kind).get("status") == status else None

        found = await eventually(check, f"{kind}={status}", timeout_seconds)
        assert found is not None
        return found

    async def until_ready(self) -> Object:
        """Wait until the workload is Ready and its agents report."""
        await self.until_condition("Ready", "True")
        return await self.until_condition("AgentsReporting", "True")

    async def until_finished(self, count: int = 1, timeout_seconds: float = 40) -> list[Object]:
        """Wait until this many restarts have an outcome; returns them, oldest first."""

        async def check() -> list[Object] | None:
            found = [one for one in await self.restarts() if one.get("status", {}).get("outcome")]
            return found if len(found) >= count else None

        found = await eventually(check, f"{count} finished restarts", timeout_seconds)
        assert found is not None
        return sorted(found, key=lambda one: str(one["metadata"]["creationTimestamp"]))
