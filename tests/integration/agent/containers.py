"""A memory cgroup that the agent takes for its container's, on cgroup v1 and v2."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import cgroups

_REMOVE_SECONDS = 20.0


class CgroupUnavailableError(Exception):
    """No memory cgroup can be made here; the message says what is missing."""


class Container:
    """A cgroup with a memory limit that a test moves."""

    def __init__(self, folder: Path, *, is_v2: bool) -> None:
        self._folder = folder
        self._is_v2 = is_v2

    def limit(self, limit_bytes: int) -> None:
        """Set the limit; the kernel reclaims page cache to keep it."""
        name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        (self._folder / name).write_text(str(limit_bytes))

    def held_bytes(self) -> int:
        """What is in use and cannot be reclaimed."""
        name = "memory.current" if self._is_v2 else "memory.usage_in_bytes"
        used = int((self._folder / name).read_text())
        lines = (self._folder / "memory.stat").read_text().splitlines()
        stat = {key: int(value) for key, value in map(str.split, lines)}
        prefix = "" if self._is_v2 else "total_"
        return used - stat[f"{prefix}inactive_file"] - stat[f"{prefix}active_file"]

    def wrapper(self) -> list[str]:
        """What, before a command, runs it in the cgroup and shows it only that, as a container."""
        root = "/sys/fs/cgroup" if self._is_v2 else "/sys/fs/cgroup/memory"
        script = (
            f'echo $$ > {self._folder}/cgroup.procs; mount --bind {self._folder} {root}; exec "$@"'
        )
        return ["unshare", "--mount", "sh", "-ec", script, "sh"]


@contextmanager
def open_container(limit_bytes: int) -> Iterator[Container]:
    """Make a container, and remove it once its processes have ended.

    Raises CgroupUnavailableError.
    """
    mounts = cgroups.mounts()
    is_v2 = "unified" in mounts
    parent = mounts.get("unified" if is_v2 else "memory")
    if parent is None:
        raise CgroupUnavailableError("no memory cgroup is mounted")
    folder = parent / f"vram-agent-test-{os.getpid()}"
    try:
        if is_v2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            (parent / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as error:
        raise CgroupUnavailableError(f"{folder} cannot be made: {error}") from error
    try:
        _ensure_mounts_allowed()
        container = Container(folder, is_v2=is_v2)
        container.limit(limit_bytes)
        yield container
    finally:
        _remove(folder)


def _ensure_mounts_allowed() -> None:
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if tried.returncode:
        reason = tried.stderr.decode(errors="replace").strip()
        raise CgroupUnavailableError(f"a mount namespace cannot be made: {reason}")


def _remove(folder: Path) -> None:
    """The kernel lets a cgroup go a moment after its last process."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
