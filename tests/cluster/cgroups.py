"""The cgroup under which one cluster's pods run, on cgroup v1 (also hybrid) and on v2.

Without a root of its own a second kubelet takes the other's pods for orphans and kills them.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from .errors import ClusterError, ClusterUnavailable

V1_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
V2_CONTROLLERS = ("cpu", "cpuset", "memory", "pids")
REMOVE_TIMEOUT_SECONDS = 20.0


def mounts() -> dict[str, Path]:
    """Each controller's mount point; on v2 the single one is called ``unified``.

    In a hybrid set-up ``unified`` has no controllers and is left out: pods use v1 there.
    """
    found: dict[str, Path] = {}
    for kind, point, options in _read_mounts():
        if kind == "cgroup2":
            found.setdefault("unified", point)
            continue
        for option in options:
            if option in V1_CONTROLLERS or option == "name=systemd":
                found.setdefault(option, point)
    if "memory" in found:
        found.pop("unified", None)
    return found


def _read_mounts() -> list[tuple[str, Path, list[str]]]:
    """Kind, mount point and options of every cgroup mount."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [
        (kind, Path(point), options.split(","))
        for _, point, kind, options, *_ in lines
        if kind in {"cgroup", "cgroup2"}
    ]


def require() -> None:
    """Raise `ClusterUnavailable` unless pods can be given cgroups here."""
    found = mounts()
    if "unified" in found:
        controllers = (found["unified"] / "cgroup.controllers").read_text().split()
        missing = [name for name in V2_CONTROLLERS if name not in controllers]
    else:
        missing = [name for name in ("cpu", "memory", "pids") if name not in found]
    if missing:
        raise ClusterUnavailable(
            f"level node needs the cgroup controllers {', '.join(missing)}, which are not mounted "
            "here; use a virtual machine or set KUBECONFIG to a cluster that has a node"
        )
    blocked = [str(point) for point in found.values() if not os.access(point, os.W_OK)]
    if blocked:
        raise ClusterUnavailable(
            f"level node needs to write to {blocked[0]}, which is read-only here (an unprivileged "
            "container?); use a virtual machine or set KUBECONFIG to a cluster that has a node"
        )


def create(name: str) -> None:
    """Make the cgroup ``name`` at the top of every hierarchy."""
    for controller, point in mounts().items():
        group = point / name
        try:
            if controller == "unified":
                _delegate(point)
            group.mkdir(exist_ok=True)
            if controller == "unified":
                _delegate(group)
            if controller == "cpuset":
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (group / file).write_text((point / file).read_text())
        except OSError as error:
            raise ClusterError(
                f"cannot set up the cgroup {group}: {error}; in a container start it with its "
                "cgroups writable, or set KUBECONFIG to a cluster that has a node"
            ) from error


def _delegate(group: Path) -> None:
    """Let the children of a v2 cgroup have the controllers; those it lacks are left out."""
    available = (group / "cgroup.controllers").read_text().split()
    enabled = (group / "cgroup.subtree_control").read_text().split()
    for controller in available:
        if controller not in enabled:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")


def remove(name: str) -> list[str]:
    """Kill what is left in the cgroup ``name`` and remove it; return what could not be removed.

    Looks in every hierarchy: in a hybrid set-up the runtime makes the group in v2 too.
    """
    deadline = time.monotonic() + REMOVE_TIMEOUT_SECONDS
    left = []
    for point in {point for _, point, _ in _read_mounts()}:
        group = point / name
        while group.exists() and not _remove_tree(group):
            if time.monotonic() > deadline:
                left.append(str(group))
                break
            time.sleep(0.05)
    return left


def _remove_tree(group: Path) -> bool:
    for folder, _, _ in os.walk(group, topdown=False):
        path = Path(folder)
        with suppress(OSError):
            for pid in (path / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        with suppress(OSError):
            path.rmdir()
    return not group.exists()
