"""Brings up etcd, kube-apiserver, kube-controller-manager and kube-scheduler.

The same four for both levels; `Addresses` says where they listen. The controller-manager and the
scheduler are there so that Deployments make pods, owners are collected, budgets have a status and
service accounts exist.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import api, build
from .launch import Launcher
from .pki import KCM, SCHEDULER, Pki
from .processes import Watched, wait_until

SERVICE_RANGE = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"
READY_TIMEOUT_SECONDS = 120.0
# Below the range from which the kernel takes ports for outgoing connections: nobody has one of
# these by chance between the moment it is found free and the moment it is listened on.
PORTS = range(12000, 32000)


@dataclass(frozen=True)
class Addresses:
    """Where the control plane listens and what it calls itself."""

    bind: str
    advertise: str
    server: str
    api_port: int
    etcd_port: int
    etcd_peer_port: int

    @property
    def url(self) -> str:
        """Where clients outside find the apiserver."""
        return f"https://{self.server}:{self.api_port}"

    @property
    def local_url(self) -> str:
        """Where the other components find it."""
        return f"https://127.0.0.1:{self.api_port}"


def loopback() -> Addresses:
    """Addresses for a control plane on this machine's loopback, on ports that are free now."""
    api_port, etcd_port, etcd_peer_port = _free_ports(3)
    return Addresses("127.0.0.1", "127.0.0.1", "127.0.0.1", api_port, etcd_port, etcd_peer_port)


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


@dataclass(frozen=True)
class ControlPlane:
    """Starts the four, in two steps so that a node can come up beside the apiserver."""

    launcher: Launcher
    pki: Pki
    addresses: Addresses

    def start_storage_and_api(self) -> Sequence[Watched]:
        """Start etcd and kube-apiserver; the latter waits for the former by itself."""
        at = self.addresses
        etcd_url = f"http://127.0.0.1:{at.etcd_port}"
        etcd = self.launcher.start(
            "etcd",
            [
                str(build.component("etcd")),
                f"--data-dir={self.launcher.directory / 'etcd'}",
                f"--listen-client-urls={etcd_url}",
                f"--listen-peer-urls=http://127.0.0.1:{at.etcd_peer_port}",
                "--unsafe-no-fsync",
            ],
        )
        flags = [
            f"--etcd-servers={etcd_url}",
            f"--bind-address={at.bind}",
            f"--advertise-address={at.advertise}",
            f"--secure-port={at.api_port}",
            f"--tls-cert-file={self.pki.certificate('apiserver')}",
            f"--tls-private-key-file={self.pki.key('apiserver')}",
            f"--client-ca-file={self.pki.ca}",
            f"--token-auth-file={self.pki.tokens}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self.pki.key('service-accounts')}",
            f"--service-account-signing-key-file={self.pki.key('service-accounts')}",
            "--allow-privileged",
            f"--kubelet-client-certificate={self.pki.certificate('apiserver-to-kubelet')}",
            f"--kubelet-client-key={self.pki.key('apiserver-to-kubelet')}",
            f"--kubelet-certificate-authority={self.pki.ca}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--cert-dir={self.launcher.directory / 'apiserver'}",
        ]
        if at.advertise == "127.0.0.1":
            # Endpoints may not be loopback addresses; without pods nobody uses that Service.
            flags.append("--endpoint-reconciler-type=none")
        server = self.launcher.start(
            "kube-apiserver", [str(build.component("kube-apiserver")), *flags]
        )
        return etcd, server

    def wait_for_api(self, kubeconfig: Path, watched: Sequence[Watched]) -> None:
        """Block until the apiserver is ready, its built-in roles included."""
        client = api.connect(kubeconfig)
        wait_until(client.is_ready, "the apiserver is ready", READY_TIMEOUT_SECONDS, watched)

    def start_controllers(self) -> Sequence[Watched]:
        """Start the controller-manager and the scheduler. They give up without an apiserver."""
        controllers = self.launcher.start(
            "kube-controller-manager",
            [
                str(build.component("kube-controller-manager")),
                f"--kubeconfig={self.kubeconfig('kube-controller-manager', KCM)}",
                "--leader-elect=false",
                "--secure-port=0",
                "--use-service-account-credentials",
                f"--root-ca-file={self.pki.ca}",
                f"--service-account-private-key-file={self.pki.key('service-accounts')}",
                f"--cluster-signing-cert-file={self.pki.ca}",
                f"--cluster-signing-key-file={self.pki.key('ca')}",
                # The default of 20 requests per second is what start-up and scale tests wait for.
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
                "--horizontal-pod-autoscaler-sync-period=2s",
            ],
        )
        scheduler = self.launcher.start(
            "kube-scheduler",
            [
                str(build.component("kube-scheduler")),
                f"--kubeconfig={self.kubeconfig('kube-scheduler', SCHEDULER)}",
                "--leader-elect=false",
                "--secure-port=0",
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
            ],
        )
        return controllers, scheduler

    def kubeconfig(self, part: str, user: str) -> Path:
        """Write the kubeconfig of a component."""
        folder = self.launcher.directory / "kubeconfigs"
        folder.mkdir(exist_ok=True)
        return self.pki.write_kubeconfig(folder / part, user, self.addresses.local_url)


def wait_for_service_account(kubeconfig: Path, watched: Sequence[Watched]) -> None:
    """Block until ``default`` has its service account: pods are refused before."""
    client = api.connect(kubeconfig)
    wait_until(
        lambda: client.get("/api/v1/namespaces/default/serviceaccounts/default") is not None,
        "the controller-manager has made the service account default/default",
        READY_TIMEOUT_SECONDS,
        watched,
    )
