"""Removes everything of one cluster, from whatever point its bring-up or life had reached.

Idempotent. Every step looks at what is really there; only the id comes from the state file.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from . import cgroups, namespaces, processes, state
from .errors import ClusterError


def remove(directory: Path) -> bool:
    """End and remove the cluster in ``directory``; False if there was none.

    Blocks for a second or two; raises `ClusterError` that names what would not go away.
    """
    known = state.load(directory)
    if known is None:
        return False
    # The holder first: with it the kernel ends all that runs in its process namespace, so that
    # nothing is started again by what is ended later.
    ordered = sorted(known.processes, key=lambda process: not process.name.startswith("holder"))
    stuck = processes.end(ordered)
    stuck += processes.end(processes.find_marked(known.id))
    left = [f"process {process.pid} ({process.name})" for process in stuck]
    if known.level == "node":
        left += [f"cgroup {group}" for group in cgroups.remove(known.scope)]
        namespaces.remove_network(known.scope)
    if left:
        raise ClusterError(
            f"the cluster in {directory} is not all gone: {', '.join(left)}; run "
            f"`python -m tests.cluster down --dir {directory}` again"
        )
    for name in state.OWN_ENTRIES:
        entry = directory / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    # Last, as everything is found through it.
    (directory / state.FILE).unlink()
    with suppress(OSError):
        directory.rmdir()
    return True
