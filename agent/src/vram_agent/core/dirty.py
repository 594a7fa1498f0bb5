"""Whether a device that others use already is open to the pod's first GPU process there.

Why it exists: what is in use before our first context is nobody's whom a model of ours could ask
to leave, so each config says how much of it is too much and what follows. Called by the supervisor
when it gathers facts and writes reports, and by ``admission`` through the pool; pure. It knows no
device and no clock. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vram_agent.protocol import DirtyAction

CHECK_SECONDS: Final = 2.0
"""How often a dirty device is looked at again while a model waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedDevice:
    """A device on which no GPU process of ours may begin now."""

    device: str
    baseline_bytes: int
    above_bytes: int
    is_refused: bool
    """Else it is waited for."""

    def explain(self) -> str:
        """Say what is in use, whose it may be and what to do."""
        return (
            f"{self.baseline_bytes} bytes of device {self.device} were in use before this pod's "
            f"first context there, more than vram.dirty.above ({self.above_bytes}): by another pod "
            "that shares the device, by a process of the node, or left by a pod that has just "
            "ended; nvidia-smi on the node names processes"
        )


def is_dirty(baseline_bytes: int, above_bytes: int) -> bool:
    """Whether more is in use by others than the config admits."""
    return baseline_bytes > above_bytes


def find_closed(
    baselines: Mapping[str, int], own: frozenset[str], above_bytes: int, action: DirtyAction
) -> dict[str, ClosedDevice]:
    """Return the devices that are closed, by UUID.

    1. The config only reports: none.
    2. A GPU process of ours is there (``own``): open, since its context is there already.
    3. Dirty: closed.
    """
    if action is DirtyAction.REPORT:
        return {}
    return {
        uuid: ClosedDevice(
            device=uuid,
            baseline_bytes=baseline_bytes,
            above_bytes=above_bytes,
            is_refused=action is DirtyAction.REFUSE,
        )
        for uuid, baseline_bytes in baselines.items()
        if uuid not in own and is_dirty(baseline_bytes, above_bytes)
    }
