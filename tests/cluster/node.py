"""Brings up the node level: the control plane and one real node around it, in own namespaces.

The order matters for time only: whatever can start before the apiserver answers does.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import api, archive, build, cgroups, namespaces, node_config, pki
from .cache import content_key, ensure_entry
from .control_plane import SERVICE_RANGE, Addresses, ControlPlane, wait_for_service_account
from .errors import ClusterError
from .launch import Launcher
from .pki import KUBELET, NODE_NAME, PROXY
from .processes import Watched, wait_until

API_PORT = 6443
GPU = "nvidia.com/gpu"
IMAGES: Mapping[str, str] = {"pause": node_config.PAUSE_IMAGE, "coredns": "localhost/coredns:1"}
READY_TIMEOUT_SECONDS = 120.0


def bring_up(launcher: Launcher) -> None:
    """Bring everything up; returns when pods run, DNS answers and the GPU can be asked for."""
    scope = launcher.state.scope
    cgroups.create(scope)
    namespaces.create_network(scope, SERVICE_RANGE)
    enter = namespaces.create_holder(launcher)
    launcher.prefix = enter
    host_port = namespaces.start_forwarder(launcher, API_PORT)
    files = pki.create(launcher.directory / "pki", ["127.0.0.1", namespaces.NODE_IP, "10.96.0.1"])
    config = node_config.write(launcher.directory, files, scope)
    containerd = launcher.start(
        "containerd", ["containerd", "--config", str(config / "containerd.toml")]
    )
    inside = Addresses("0.0.0.0", namespaces.NODE_IP, "127.0.0.1", API_PORT, 2379, 2380)
    plane = ControlPlane(launcher, files, inside)
    watched = [containerd, *plane.start_storage_and_api()]
    admin = files.write_kubeconfig(
        launcher.directory / "kubeconfig", pki.ADMIN, f"https://127.0.0.1:{host_port}"
    )
    _import_own_images(enter, containerd)
    plane.wait_for_api(admin, watched)
    watched += plane.start_controllers()
    watched += _start_kubelet_and_proxy(plane, config)
    _apply(admin, Path(__file__).parent / "manifests" / "coredns.yaml")
    _wait_for_node(admin, watched)
    wait_for_service_account(admin, watched)
    _wait_for_dns(admin, watched)


def _start_kubelet_and_proxy(plane: ControlPlane, config: Path) -> list[Watched]:
    kubelet = plane.launcher.start(
        "kubelet",
        [
            str(build.component("kubelet")),
            f"--kubeconfig={plane.kubeconfig('kubelet', KUBELET)}",
            f"--config={config / 'kubelet.json'}",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={namespaces.NODE_IP}",
        ],
    )
    # The proxy's configuration names this file.
    plane.kubeconfig("kube-proxy", PROXY)
    proxy = plane.launcher.start(
        "kube-proxy",
        [str(build.component("kube-proxy")), f"--config={config / 'kube-proxy.json'}"],
    )
    return [proxy, kubelet]


def _wait_for_node(kubeconfig: Path, watched: Sequence[Watched]) -> None:
    """Block until the node is Ready and has a GPU.

    There is no device plugin: both figures are written into the node's status, where the kubelet
    keeps what it does not know (seen over status writes and restarts of the kubelet).
    """
    client = api.connect(kubeconfig)
    path = f"/api/v1/nodes/{NODE_NAME}"

    def is_ready() -> bool:
        conditions = (client.get(path) or {}).get("status", {}).get("conditions", [])
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

    def has_gpu() -> bool:
        status = (client.get(path) or {}).get("status", {})
        if status.get("allocatable", {}).get(GPU) == "1":
            return True
        name = GPU.replace("/", "~1")
        client.patch_json(
            f"{path}/status",
            [
                {"op": "add", "path": f"/status/{kind}/{name}", "value": "1"}
                for kind in ("capacity", "allocatable")
            ],
        )
        return False

    wait_until(is_ready, f"the node {NODE_NAME} is Ready", READY_TIMEOUT_SECONDS, watched)
    wait_until(has_gpu, f"{NODE_NAME} has {GPU}: 1", READY_TIMEOUT_SECONDS, watched)


def _wait_for_dns(kubeconfig: Path, watched: Sequence[Watched]) -> None:
    client = api.connect(kubeconfig)

    def is_available() -> bool:
        found = client.get("/apis/apps/v1/namespaces/kube-system/deployments/coredns")
        return bool((found or {}).get("status", {}).get("availableReplicas"))

    wait_until(is_available, "CoreDNS is available", READY_TIMEOUT_SECONDS, watched)


def _apply(kubeconfig: Path, manifest: Path) -> None:
    done = subprocess.run(
        [
            *(str(build.component("kubectl")), f"--kubeconfig={kubeconfig}"),
            *("apply", "--server-side", "--validate=false", "-f", str(manifest)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ClusterError(f"cannot apply {manifest}: {done.stderr.strip()}")


def _import_own_images(enter: Sequence[str], containerd: Watched) -> None:
    def answers() -> bool:
        command = [*enter, "ctr", "version"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    wait_until(answers, "containerd answers", READY_TIMEOUT_SECONDS, [containerd])
    for name, reference in IMAGES.items():
        import_image(enter, _own_image(name, reference))


def _own_image(name: str, reference: str) -> Path:
    """The archive of an image with one program of ours."""
    program = build.ensure_program(name) / name
    config = archive.ImageConfig(reference, entrypoint=[f"/{name}"])
    key = content_key([], program.parent.name, repr(config))

    def write(folder: Path) -> None:
        archive.write_program_image(folder / "image.tar", config, program)

    return ensure_entry(f"image-{name}", key, write) / "image.tar"


def import_image(enter: Sequence[str], image: Path) -> list[str]:
    """Import an archive into the containerd that ``enter`` leads to; return the images' names.

    The archive comes over standard input, as the node's mount namespace does not show every
    folder under its name on this machine.
    """
    with image.open("rb") as content:
        done = subprocess.run(
            [*enter, "ctr", "--namespace=k8s.io", "images", "import", "-"],
            stdin=content,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise ClusterError(
            f"containerd refused {image}: {done.stderr.strip()}; it takes archives of "
            "`docker save`, `buildah push … docker-archive:` or `oci-archive:`"
        )
    return re.findall(r"^unpacking (\S+) \(", done.stdout, re.MULTILINE)


def tag_image(enter: Sequence[str], reference: str, other: str) -> None:
    """Give an image that containerd has another name as well."""
    command = [*enter, "ctr", "--namespace=k8s.io", "images", "tag", reference, other]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"containerd refused to tag {reference}: {done.stderr.strip()}")
