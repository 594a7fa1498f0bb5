"""Writes the configuration files of containerd, CNI, kubelet and kube-proxy. Starts nothing.

Paths below ``/run``, ``/var/lib`` and ``/var/log`` are those inside the node's mount namespace,
see `namespaces`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import prerequisites
from .namespaces import NODE_IP
from .pki import NODE_NAME, Pki

PAUSE_IMAGE = "localhost/pause:1"
DNS_IP = "10.96.0.10"
POD_RANGE = "10.88.0.0/16"
CONTAINERD = """\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
# Negative values need CAP_SYS_RESOURCE, which root in a container may lack.
oom_score = 0

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni_programs}"
conf_dir = "{cni_config}"
"""


def write(directory: Path, files: Pki, cgroup: str) -> Path:
    """Write all of them below ``directory``; return the folder."""
    folder = directory / "config"
    network = folder / "cni"
    network.mkdir(parents=True)
    (folder / "containerd.toml").write_text(
        CONTAINERD.format(
            pause=PAUSE_IMAGE,
            snapshotter="native" if prerequisites.is_overlay(directory) else "overlayfs",
            cni_programs=prerequisites.cni_folder(),
            cni_config=network,
        )
    )
    _write_json(network / "10-pods.conflist", _cni())
    _write_json(folder / "kubelet.json", _kubelet(files, cgroup))
    _write_json(folder / "kube-proxy.json", _proxy(directory / "kubeconfigs" / "kube-proxy"))
    return folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _cni() -> dict[str, Any]:
    return {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-addresses",
                    "ranges": [[{"subnet": POD_RANGE}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def _kubelet(files: Pki, cgroup: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_IP,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(files.ca)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(files.certificate("kubelet")),
        "tlsPrivateKeyFile": str(files.key("kubelet")),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        # Space is the host's affair: a nearly full disk must not evict the test's pods.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
        },
        # The doubling back-off of up to 300 s would be most of an end-to-end run.
        "featureGates": {"KubeletCrashLoopBackOffMax": True},
        "crashLoopBackOff": {"maxContainerRestartPeriod": "5s"},
    }


def _proxy(kubeconfig: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": NODE_NAME,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "iptables": {"masqueradeAll": True},
        # Zeros leave the host's limits alone; they are not of a network namespace.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpCloseWaitTimeout": "0s",
            "tcpEstablishedTimeout": "0s",
        },
    }
