"""A namespace of its own for each test, with a kubelet and operators that a test starts."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from tests.cluster import Cluster
from tests.integration.operator.client import Client
from tests.integration.operator.kubelet import Kubelet
from tests.integration.operator.processes import Operator
from tests.integration.operator.world import World

CRDS = Path(__file__).parents[3] / "crds"
NODE = "operator-tests"


@contextmanager
def serve_control_plane(control_plane: Cluster) -> Iterator[str]:
    """The control plane with the CRDs and a node, behind ``kubectl proxy``."""
    with prepared(control_plane) as url:
        yield url


@contextmanager
def prepared(control_plane: Cluster) -> Iterator[str]:
    """Install the CRDs and a node; gives the URL of a ``kubectl proxy`` that ends with it."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
    control_plane.kubectl(
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd/gpumodelworkloads.vram.dev",
        "crd/gpupodrestarts.vram.dev",
    )
    # Nothing is scheduled to it by itself: the tests' kubelets bind their own pods.
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE},
        "spec": {"unschedulable": True},
    }
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(node))
    command = [*control_plane.kubectl_command(), "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        yield "http://" + proxy.stdout.readline().rsplit(" ", 1)[1].strip()
        proxy.terminate()


@pytest.fixture(scope="session")
def server(control_plane: Cluster) -> Iterator[str]:
    """The address of the control plane that all tests share."""
    with serve_control_plane(control_plane) as address:
        yield address


@pytest.fixture(scope="session")
def control_plane_kubeconfig(control_plane: Cluster) -> Path:
    """The kubeconfig that operators use."""
    return control_plane.kubeconfig


@asynccontextmanager
async def open_world(server: str, kubeconfig: Path, folder: Path) -> AsyncIterator[World]:
    """A fresh namespace with a kubelet in it; whatever was started ends with it."""
    started: list[Operator] = []
    namespace = f"op-{secrets.token_hex(4)}"

    def make(
        *flags: str,
        kubeconfig: Path = kubeconfig,
        all_namespaces: bool = False,
        module: str = "vram_operator",
    ) -> Operator:
        log = folder / f"operator-{len(started)}.log"
        served = () if all_namespaces else (f"--namespace={namespace}",)
        always = ("--poll-interval=0.5", *served)
        operator = Operator(kubeconfig, namespace, log, *always, *flags, module=module)
        started.append(operator)
        return operator

    async with aiohttp.ClientSession() as session:
        client = Client(session, server, namespace)
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        await client.send("POST", "/api/v1/namespaces", body)
        kubelet = Kubelet(client, [NODE])
        playing = asyncio.create_task(kubelet.run())
        try:
            yield World(client, kubelet, make)
            if playing.done():
                playing.result()
        finally:
            for operator in started:
                operator.kill()
                if operator.was_started:
                    await operator.wait()
                print(f"--- {operator.name}\n{operator.log}")
            playing.cancel()
            with suppress(asyncio.CancelledError):
                await playing
            await client.send("DELETE", f"/api/v1/namespaces/{namespace}")


@pytest.fixture
async def world(
    server: str, control_plane_kubeconfig: Path, tmp_path: Path
) -> AsyncIterator[World]:
    """A namespace with everything, and operators that a test starts."""
    async with open_world(server, control_plane_kubeconfig, tmp_path) as opened:
        yield opened
