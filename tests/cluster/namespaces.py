"""The namespaces of one node: its network, its mounts and its processes.

- The network namespace has a name (``ip netns``), so that tests can enter it. In it the default
  ports never collide, and iptables rules and bridges vanish with it. Nothing leads out of it but
  one forwarded port, for the apiserver.
- The mount and the process namespace belong to one small process, the *holder*, which is PID 1 in
  there. When it ends the kernel ends everything that runs inside and undoes every mount, whatever
  state containerd and the kubelet are in.

In the mount namespace ``/run`` and ``/var/log`` are empty and ``/var/lib`` is a folder of the
cluster, so that paths which kubelet, containerd and CNI have compiled in (the device-plugin
socket, ``/var/log/containers``, shim sockets, CNI's cache) are not shared by two clusters and leave
nothing on the host, and sockets have short paths wherever the cluster's directory is.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import build
from .errors import ClusterError
from .launch import Launcher
from .processes import wait_until

T = TypeVar("T")
NETNS_FOLDER = Path("/run/netns")
HOLDER = "holder-init"
NODE_IP = "10.89.1.1"
CLONE_NEWNET = 0x40000000


def create_network(name: str, service_range: str) -> None:
    """Make the network namespace ``name`` with the node's address; it has no way out."""
    _run("ip", "netns", "add", name)
    for arguments in (
        ["link", "set", "lo", "up"],
        # The kubelet refuses a loopback address as the node's; a bridge holds one and is up alone.
        ["link", "add", "node0", "type", "bridge"],
        ["address", "add", f"{NODE_IP}/32", "dev", "node0"],
        ["link", "set", "node0", "up"],
        # Without any route the kernel refuses cluster addresses before iptables can rewrite them.
        ["route", "add", service_range, "dev", "node0"],
    ):
        _run("ip", "-netns", name, *arguments)
    in_thread(NETNS_FOLDER / name, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))


def create_holder(launcher: Launcher) -> list[str]:
    """Start the holder, prepare its mounts and return the prefix that enters its namespaces."""
    holder = launcher.start(
        "holder",
        [
            *("nsenter", f"--net={launcher.state.netns}"),
            *("unshare", "--mount", "--propagation=slave", "--pid", "--fork", "--kill-child"),
            *("--mount-proc", "--", str(build.ensure_program("pause") / "pause")),
        ],
    )
    outer = holder[0].pid
    children = Path(f"/proc/{outer}/task/{outer}/children")

    def is_paused() -> bool:
        pids = children.read_text().split() if children.exists() else []
        return bool(pids) and Path(f"/proc/{pids[0]}/exe").resolve().name == "pause"

    wait_until(is_paused, "the namespaces are there", 20.0, [holder])
    inner = children.read_text().split()[0]
    launcher.record(HOLDER, int(inner))
    prefix = enter_all(int(inner))
    own = launcher.directory / "node"
    for name in ("kubelet", "containerd", "cni"):
        (own / name).mkdir(parents=True, exist_ok=True)
    for command in (
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/var/log"],
        ["mount", "--bind", str(own), "/var/lib"],
        ["mkdir", "/run/netns", "/run/containerd"],
    ):
        _run(*prefix, *command)
    return prefix


def enter_all(holder_pid: int) -> list[str]:
    """The command prefix that runs something as one of the node's own processes."""
    return ["nsenter", f"--target={holder_pid}", "--mount", "--net", "--pid", "--"]


def start_forwarder(launcher: Launcher, port: int) -> int:
    """Open a port on the host's loopback that leads to ``port`` on the loopback in there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host_port: int = listener.getsockname()[1]
        fd = listener.fileno()
        command = [str(build.ensure_program("forward") / "forward"), str(fd), f"127.0.0.1:{port}"]
        launcher.start("forward", command, pass_fds=(fd,))
    return host_port


def remove_network(name: str) -> None:
    """Remove the network namespace ``name``; one that is not there is fine."""
    if (NETNS_FOLDER / name).exists():
        _run("ip", "netns", "delete", name)


def in_thread(netns: Path, call: Callable[[], T]) -> T:
    """Run ``call`` in a thread that has joined ``netns``; blocks until it returns.

    A socket made in there stays in that network wherever it is used afterwards.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            fd = os.open(netns, os.O_RDONLY)
            try:
                library = ctypes.CDLL(None, use_errno=True)
                if library.setns(fd, CLONE_NEWNET) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, f"setns: {os.strerror(code)}", str(netns))
            finally:
                os.close(fd)
            results.append(call())
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=work, name=f"in-{netns.name}")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(
            f"`{' '.join(command)}` failed (exit {done.returncode}): {done.stderr.strip()}"
        )
    return done.stdout
