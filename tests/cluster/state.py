"""What is known of one cluster, in ``state.json`` of its directory, so that anybody can end it.

Written before each thing is made and not after it: a caller that is killed at any point leaves a
file from which `down` finds everything. All names are derived from ``id``.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from .errors import ClusterError
from .processes import Process

Level = Literal["control-plane", "node"]
FILE = "state.json"
# All that a cluster has in its directory beside the state; nothing else there is ever removed.
OWN_ENTRIES = (
    "state.json.tmp",
    "kubeconfig",
    "kubeconfigs",
    "pki",
    "config",
    "logs",
    "etcd",
    "apiserver",
    "node",
    "bin",
    "values.yaml",
)


@dataclass(frozen=True)
class State:
    """``ready`` turns true as the last step of `up`."""

    id: str
    level: Level
    ready: bool = False
    processes: tuple[Process, ...] = field(default=())

    @property
    def scope(self) -> str:
        """The name of the network namespace and of the cgroup."""
        return f"vram-{self.id}"

    @property
    def netns(self) -> Path:
        """Where ``ip netns`` keeps the network namespace of a node cluster."""
        return Path("/run/netns") / self.scope

    def holder(self) -> Process | None:
        """The process that is PID 1 in the node's namespaces, if there is one."""
        return next((item for item in self.processes if item.name == "holder-init"), None)

    def with_process(self, process: Process) -> State:
        """The same with one more process."""
        return replace(self, processes=(*self.processes, process))


def new(level: Level) -> State:
    """A state with an id that no other cluster has."""
    return State(id=secrets.token_hex(4), level=level)


def save(directory: Path, state: State) -> None:
    """Replace the file in one step."""
    unfinished = directory / f"{FILE}.tmp"
    unfinished.write_text(json.dumps(asdict(state), indent=2) + "\n")
    unfinished.replace(directory / FILE)


def load(directory: Path) -> State | None:
    """Read the file; None where there is no cluster."""
    path = directory / FILE
    try:
        data = json.loads(path.read_text())
        processes = tuple(Process(**item) for item in data.pop("processes"))
        return State(**data, processes=processes)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ClusterError(
            f"{path} is not what this version writes ({error}); end the processes that have "
            "VRAM_CLUSTER_ID in their environment and remove the folder"
        ) from error
