"""Says in one line why a machine cannot run the node level, and installs what apt-get can.

Called before anything is made, so that a refusal leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from . import cgroups
from .cache import cache_dir, locked
from .errors import ClusterError, ClusterUnavailable
from .processes import search_path, tail

CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
NODE_PROGRAMS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mount": "mount",
}
DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
IMAGE_PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap"}
# Replaced inside the node's mount namespace by folders of the cluster's own.
HIDDEN = (Path("/run"), Path("/var/run"), Path("/var/lib"), Path("/var/log"))
ELSEWHERE = "run as root on a virtual machine, or set KUBECONFIG to a cluster that has a node"


def require_node(directory: Path) -> None:
    """Raise unless the node level can run here with its files in ``directory``."""
    if sys.platform != "linux":
        raise ClusterUnavailable(f"level node needs Linux, this is {sys.platform}; {ELSEWHERE}")
    if os.geteuid() != 0:
        raise ClusterUnavailable(f"level node needs root, this is uid {os.geteuid()}; {ELSEWHERE}")
    if not _can_make_namespaces():
        raise ClusterUnavailable(
            f"level node needs CAP_SYS_ADMIN to make namespaces, root here lacks it; {ELSEWHERE}"
        )
    cgroups.require()
    for path, name in ((directory, "the cluster's directory"), (cache_dir(), "the cache")):
        hidden = [place for place in HIDDEN if path.resolve().is_relative_to(place)]
        if hidden:
            raise ClusterError(
                f"{name} {path} is below {hidden[0]}, which the node replaces by its own; choose "
                "another place (--dir, XDG_CACHE_HOME)"
            )
    ensure_programs(NODE_PROGRAMS)
    if cni_folder() is None:
        _install(["containernetworking-plugins"])
    if cni_folder() is None:
        raise ClusterUnavailable(
            f"level node needs the CNI plugins in {CNI_FOLDERS[0]}; install the package "
            "containernetworking-plugins"
        )


def require_root_for(task: str) -> None:
    """Raise unless this is root on Linux."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise ClusterUnavailable(f"{task} needs root on Linux; {ELSEWHERE}")


def is_overlay(folder: Path) -> bool:
    """Does ``folder`` lie on an overlay, as in a container? Another overlay cannot lie on it."""
    done = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "overlay" in done.stdout


def _can_make_namespaces() -> bool:
    """Ask the kernel: a capability can be there and its use still be filtered by seccomp."""
    try:
        done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ClusterUnavailable(
            "level node needs unshare of util-linux, which is not on PATH; install util-linux"
        ) from error
    return done.returncode == 0


def cni_folder() -> Path | None:
    """Where the CNI plugins are, if all that the node uses are there."""
    for folder in CNI_FOLDERS:
        if all((folder / name).exists() for name in ("bridge", "host-local", "portmap")):
            return folder
    return None


def ensure_programs(wanted: Mapping[str, str]) -> None:
    """Install the Debian package of each program of ``wanted`` that is not on PATH."""
    missing = {program: package for program, package in wanted.items() if not _which(program)}
    if not missing:
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise ClusterUnavailable(
            f"{', '.join(missing)} not found and cannot be installed here without root and "
            f"apt-get; install {', '.join(sorted(set(missing.values())))} or set KUBECONFIG to a "
            "cluster that has a node"
        )
    _install(sorted(set(missing.values())))
    still = [program for program in missing if not _which(program)]
    if still:
        raise ClusterUnavailable(
            f"{', '.join(still)} still not on PATH after installing "
            f"{', '.join(sorted(set(missing.values())))}; install them by hand"
        )


def ensure_debian_keyring() -> None:
    """Debootstrap checks signatures with it; other distributions do not have it by themselves."""
    if not DEBIAN_KEYRING.exists():
        _install(["debian-archive-keyring"])


def _which(program: str) -> str | None:
    return shutil.which(program, path=search_path())


def _install(packages: list[str]) -> None:
    """Install packages without starting the services that some of them bring along."""
    log = cache_dir() / "logs" / "apt-get.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"cluster: installing {' '.join(packages)} with apt-get", file=sys.stderr)
    with locked("apt-get"), log.open("wb") as output, _NoServices():
        for arguments in (
            ["update"],
            ["install", "--yes", "--no-install-recommends", *packages],
        ):
            done = subprocess.run(
                ["apt-get", "--option", "DPkg::Lock::Timeout=300", *arguments],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
            # A repository of somebody else's that is down must not stop us: install decides.
            if done.returncode != 0 and arguments[0] == "install":
                raise ClusterUnavailable(
                    f"apt-get could not install {', '.join(packages)}; install them by hand or "
                    "set KUBECONFIG to a cluster that has a node. End of "
                    f"{log}:\n{tail(log)}"
                )


class _NoServices:
    """While it is entered, package scripts do not start services (policy-rc.d, exit 101)."""

    path = Path("/usr/sbin/policy-rc.d")

    def __enter__(self) -> None:
        self.made = not self.path.exists()
        if self.made:
            self.path.write_text("#!/bin/sh\nexit 101\n")
            self.path.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        if self.made:
            self.path.unlink(missing_ok=True)
