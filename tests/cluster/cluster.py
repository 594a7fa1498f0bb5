"""The cluster as its users see it, and the one function that makes it.

Composes the other modules; they do not know this one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import api, build, namespaces, node, pki, prerequisites, state, teardown
from .cache import cache_dir, locked
from .control_plane import Addresses, ControlPlane, loopback, wait_for_service_account
from .errors import ClusterError
from .launch import Launcher
from .state import Level, State

PORT_ATTEMPTS = 3
USER_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Cluster:
    """A running cluster. ``managed`` is False for the user's own, which is never taken down.

    ``netns`` is the network namespace in which pod and service addresses work; None where they
    are reached from here already, or not at all (level control-plane).
    """

    directory: Path
    level: Level
    kubeconfig: Path
    managed: bool = True
    netns: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def down(self) -> None:
        """Remove the cluster and its directory. Idempotent; nothing if it is the user's own."""
        if self.managed:
            down(self.directory)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl and return what it prints; `ClusterError` with its complaint if it fails."""
        command = [*self.kubectl_command(), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ClusterError(
                f"kubectl {' '.join(arguments)} failed (exit {done.returncode}): "
                f"{done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def kubectl_command(self) -> list[str]:
        """The kubectl of the cluster's own version with its kubeconfig, for a process of yours."""
        program = build.component("kubectl") if self.managed else _user_kubectl()
        return [str(program), f"--kubeconfig={self.kubeconfig}"]

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` where pod and service addresses can be reached."""
        if self.netns is None:
            return list(command)
        return ["nsenter", f"--net={self.netns}", "--", *command]

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` of ``command`` inside; by default captured text and ``check=True``.

        It sees this machine's files and the cluster's network, and there is no DNS for it: use
        the addresses of pods and services.
        """
        options = {"capture_output": True, "text": True, "check": True, **options}
        result: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: PLW1510
            self.inside(command), **options
        )
        return result

    def connect(self, host: str, port: int, timeout_seconds: float = 10.0) -> socket.socket:
        """A TCP connection to a pod or service address, usable here like any other socket."""

        def dial() -> socket.socket:
            return socket.create_connection((host, port), timeout=timeout_seconds)

        return dial() if self.netns is None else namespaces.in_thread(self.netns, dial)

    def load_image(self, archive: Path) -> list[str]:
        """Import an image archive into the node; return the names that pods can use.

        Pods then say ``imagePullPolicy: Never``. Blocks; about 10 s for 500 MB.
        """
        return node.import_image(self._enter_node(f"load {archive}"), archive)

    def tag_image(self, reference: str, other: str) -> None:
        """Give an image of the node another name as well."""
        node.tag_image(self._enter_node(f"tag {reference}"), reference, other)

    def _enter_node(self, what: str) -> list[str]:
        known = state.load(self.directory)
        holder = known.holder() if known else None
        if holder is None or not holder.is_alive():
            raise ClusterError(
                f"cannot {what}: {self.directory} has no running node of ours; start one "
                "with level node, or push the image where your own cluster pulls from"
            )
        return namespaces.enter_all(holder.pid)


def up(level: Level, directory: Path) -> Cluster:
    """Return a running cluster of ``level`` with its files in ``directory``; see the package.

    Blocks: 5 to 15 s when the programs are built, minutes the first time. If it fails, what was
    started is removed and its logs are kept in the cache, under ``logs/last-failed-up``.
    """
    own = os.environ.get("KUBECONFIG")
    if own:
        return _check_own(own, level, directory)
    directory = directory.absolute()
    if level == "node":
        prerequisites.require_node(directory)
        for program in ("pause", "coredns", "forward"):
            build.ensure_program(program)
    build.ensure_program("k8s")
    with _directory_lock(directory):
        existing = _find(directory)
        if existing is not None and existing.level == level:
            return existing
        if teardown.remove(directory):
            print(f"cluster: removed what was left in {directory}", file=sys.stderr)
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                return _bring_up(level, directory)
            except ClusterError as error:
                explained = _give_up(directory, error)
                taken = "address already in use" in str(error)
                if not taken or attempt == PORT_ATTEMPTS:
                    raise explained from error
            except BaseException:
                teardown.remove(directory)
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def down(directory: Path) -> bool:
    """Remove the cluster in ``directory`` in whatever state it is; False if there was none."""
    directory = directory.absolute()
    if not directory.exists():
        return False
    with _directory_lock(directory):
        return teardown.remove(directory)


def find(directory: Path) -> Cluster | None:
    """Return the cluster that runs in ``directory``; None if none does or a part has ended."""
    return _find(directory.absolute())


def _find(directory: Path) -> Cluster | None:
    known = state.load(directory)
    if known is None or not known.ready:
        return None
    if not all(process.is_alive() for process in known.processes):
        return None
    cluster = _describe(directory, known)
    return cluster if api.connect(cluster.kubeconfig).is_ready() else None


def _describe(directory: Path, known: State) -> Cluster:
    return Cluster(
        directory=directory,
        level=known.level,
        kubeconfig=directory / "kubeconfig",
        netns=known.netns if known.level == "node" else None,
    )


def _bring_up(level: Level, directory: Path) -> Cluster:
    if directory.exists() and any(directory.iterdir()):
        raise ClusterError(
            f"{directory} is not empty and holds no cluster; name an empty or a new folder"
        )
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(directory, state.new(level))
    if level == "node":
        node.bring_up(launcher)
    else:
        _bring_up_control_plane(launcher, loopback())
    launcher.finish()
    seconds = time.monotonic() - started
    print(f"cluster: {level} in {directory} is up after {seconds:.1f} s", file=sys.stderr)
    return _describe(directory, launcher.state)


def _bring_up_control_plane(launcher: Launcher, addresses: Addresses) -> None:
    files = pki.create(launcher.directory / "pki", ["127.0.0.1"])
    plane = ControlPlane(launcher, files, addresses)
    watched = plane.start_storage_and_api()
    admin = files.write_kubeconfig(launcher.directory / "kubeconfig", pki.ADMIN, addresses.url)
    plane.wait_for_api(admin, watched)
    controllers = plane.start_controllers()
    wait_for_service_account(admin, [*watched, *controllers])


def _give_up(directory: Path, error: ClusterError) -> ClusterError:
    """Take a failed cluster down; return the error that says where its logs are now."""
    kept = cache_dir() / "logs" / "last-failed-up"
    logs = directory / "logs"
    if logs.is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, symlinks=True)
    teardown.remove(directory)
    return type(error)(str(error).replace(str(logs), str(kept)))


def _directory_lock(directory: Path) -> Any:
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    return locked(f"directory-{digest}")


def _check_own(own: str, level: Level, directory: Path) -> Cluster:
    """The user's cluster, if it answers."""
    kubeconfig = Path(own)
    if not kubeconfig.is_file():
        raise ClusterError(
            f"KUBECONFIG={own} is no file; set it to one kubeconfig whose cluster answers, or "
            "unset it to get a local cluster"
        )
    ours = kubeconfig.resolve().parent
    existing = _find(ours)
    if existing is not None and existing.kubeconfig == kubeconfig.resolve():
        # One that `up` made: its network and its node are known, and it stays the user's.
        return replace(existing, managed=False)
    done = subprocess.run(
        [
            *(str(_user_kubectl()), f"--kubeconfig={own}", "get", "--raw=/readyz"),
            f"--request-timeout={USER_TIMEOUT_SECONDS}s",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        complaint = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ClusterError(
            f"KUBECONFIG={own} is set, but its cluster does not answer: {complaint}. Start that "
            "cluster, or unset KUBECONFIG to get a local one"
        )
    return Cluster(directory.absolute(), level, kubeconfig, managed=False)


def _user_kubectl() -> Path:
    """The kubectl on PATH, else ours: a user's cluster may ask for a login helper of its own."""
    found = shutil.which("kubectl")
    return Path(found) if found else build.component("kubectl")
