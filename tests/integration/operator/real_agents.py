"""Real agents for the played kubelet: ``vram-agent serve`` with the operator's config."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from vram_agent.protocol import SERVING_PORT

from tests.integration.operator.client import CORE, Client, Object
from tests.integration.operator.kubelet import Kubelet

MODELS = Path(__file__).parent
LEAKY = {
    "name": "leaky",
    "runtime": "Python",
    "source": "leaky:make",
    "options": {"path": str(MODELS)},
    # The GPU process stays after a task, and with it what it leaked.
    "residency": {"afterTask": "Keep", "offloadTier": "PinnedHost", "idleTimeoutSeconds": 0},
}


@dataclass
class RealAgent:
    """One pod's container: its volumes are folders here, its process is PID 1."""

    client: Client
    pod: Object
    folder: Path
    on_exit: Callable[[], None] = lambda: None
    exits: list[int] = field(default_factory=list)
    _process: asyncio.subprocess.Process | None = None
    _watch: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        config = await self._mount()
        metadata = self.pod["metadata"]
        environment = {
            **os.environ,
            "POD_NAME": metadata["name"],
            "POD_NAMESPACE": metadata["namespace"],
            "POD_UID": metadata["uid"],
            "VRAM_AGENT_STATE_DIR": str(self.folder / "state"),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "agent.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vram_agent",
                "serve",
                f"--config={config}",
                f"--listen-serving={host}:{SERVING_PORT}",
                f"--listen-control={host}:{port}",
                "--log-format=console",
                env=environment,
                stdout=output,
                stderr=output,
            )
        self._watch = asyncio.create_task(self._wait(self._process))
        return port

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await asyncio.wait_for(self._process.wait(), 40)

    def reboot(self) -> None:
        """The next start is another process anyway."""

    @property
    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        self.exits.append(await process.wait())
        self.on_exit()

    async def _mount(self) -> Path:
        """Write what the pod's volumes hold: the config and the operator's public keys."""
        (self.folder / "state").mkdir(exist_ok=True)
        keys = self.folder / "keys.pem"
        trust = await self.client.find(CORE, "configmaps", "vram-agent-trust")
        keys.write_text(trust["data"]["keys.pem"])
        mounted = await self.client.find(
            CORE, "configmaps", self.pod["metadata"]["labels"]["vram.dev/workload"]
        )
        (text,) = mounted["data"].values()
        document: dict[str, Any] = json.loads(text)
        # In a pod this is the place where the ConfigMap is mounted.
        document["control"] = {"publicKeyFile": str(keys)}
        config = self.folder / "config.json"
        config.write_text(json.dumps(document))
        return config


def real_agents(folder: Path) -> Callable[[Kubelet, Object], RealAgent]:
    """Return how a kubelet makes the container of a pod."""

    def make(kubelet: Kubelet, pod: Object) -> RealAgent:
        own = folder / pod["metadata"]["uid"]
        own.mkdir()
        return RealAgent(kubelet.client, pod, own)

    return make


async def leak(ip: str, mebibytes: int) -> None:
    """Have the model LEAKY of the agent at this address keep memory, as a request would."""
    body = {
        "inputs": [{"name": "mebibytes", "shape": [1], "datatype": "INT64", "data": [mebibytes]}]
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{ip}:{SERVING_PORT}/v2/models/leaky/infer", json=body) as response,
    ):
        assert response.status == 200, await response.text()
