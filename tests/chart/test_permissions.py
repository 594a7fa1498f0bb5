"""The real operator does its work with the rights that the chart gives it, and asks for no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chart.conftest import CHART, Helm
from tests.cluster import Cluster, ClusterError

pytestmark = pytest.mark.control_plane

WORKLOAD = {
    "apiVersion": "vram.dev/v1alpha1",
    "kind": "GPUModelWorkload",
    "metadata": {"name": "speech"},
    "spec": {
        "template": {"gpu": {"count": 0}},
        "models": [{"name": "whisper", "runtime": "Whisper", "source": "/models/tiny.pt"}],
    },
}
REFUSED = re.compile(r'vram_operator_api_requests_total\{code="40[13]".*')


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 60 s"
        time.sleep(0.2)


@contextmanager
def installed(helm: Helm, where: Cluster, namespace: str, served: list[str]) -> Iterator[Path]:
    """A release of its own; yields a kubeconfig with the rights of the operator's account."""
    flags = (f"--kubeconfig={where.kubeconfig}", f"--namespace={namespace}", "--create-namespace")
    values = {"crds": {"enabled": False}, "namespaces": served, "replicas": 0}
    helm.run("install", "vram-operator", str(CHART), *flags, values=values)
    try:
        token = where.kubectl("create", "token", "vram-operator", "-n", namespace).strip()
        text = where.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
        config = json.loads(text)
        config["users"][0]["user"] = {"token": token}
        path = helm.home / f"{namespace}.kubeconfig"
        path.write_text(json.dumps(config))
        yield path
    finally:
        helm.run("uninstall", "vram-operator", *flags[:2])


@contextmanager
def operating(kubeconfig: Path, namespace: str, served: list[str]) -> Iterator[str]:
    """The operator as that account; yields the address of its metrics."""
    log = kubeconfig.with_suffix(".log")
    command = [sys.executable, "-m", "vram_operator", "run"]
    flags = ["--agent-image=vram-agent:none", "--metrics-port=0", "--lease-name=vram-operator"]
    environment = {"KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": namespace, "POD_NAME": "test"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*command, *flags, *(f"--namespace={one}" for one in served)],
            stdout=output,
            stderr=output,
            env=environment,
        ) as process,
    ):
        try:
            wait_for("the operator's start", lambda: '"port"' in log.read_text())
            port = json.loads(log.read_text().splitlines()[0])["port"]
            yield f"http://127.0.0.1:{port}/metrics"
        finally:
            process.terminate()


def metrics(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=10) as response:
        return str(response.read(), "utf-8")


@pytest.mark.parametrize(
    "served",
    [
        pytest.param([], id="in all namespaces by a ClusterRole"),
        pytest.param(["team-narrow"], id="in one namespace by a Role"),
    ],
)
def test_a_workload_gets_its_objects_and_status(
    helm: Helm, control_plane: Cluster, served: list[str]
) -> None:
    team = served[0] if served else "team-wide"
    own = f"{team}-operator"
    control_plane.kubectl("apply", "--server-side", "-f", str(CHART.parents[1] / "crds"))
    control_plane.kubectl("create", "namespace", team)

    def exists(*what: str) -> bool:
        try:
            return bool(control_plane.kubectl("-n", team, "get", *what))
        except ClusterError:
            return False

    with (
        installed(helm, control_plane, own, served) as kubeconfig,
        operating(kubeconfig, own, served) as address,
    ):
        control_plane.kubectl("-n", team, "apply", "-f", "-", stdin=json.dumps(WORKLOAD))
        for kind in ("deployment", "service", "configmap"):
            wait_for(f"the {kind}", lambda kind=kind: exists(f"{kind}/speech"))  # type: ignore[misc]
        wait_for("the trust", lambda: exists("configmap/vram-agent-trust"))
        control_plane.kubectl(
            "-n", team, "wait", "gmw/speech", "--for=condition=Accepted", "--timeout=60s"
        )
        assert REFUSED.findall(metrics(address)) == []
    control_plane.kubectl("-n", team, "delete", "gmw/speech")
