"""Names and numbers that never change without an issue, and the enums of spec and report. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta

API_VERSION = "vram.dev/v1alpha1"
REPORT_PROTOCOL = "v1"
WORKLOAD_LABEL = "vram.dev/workload"
CONTROL_PORT_ANNOTATION = "vram.dev/control-port"
RESTART_ANNOTATION = "vram.dev/restart"
SERVING_PORT = 8000
CONTROL_PORT = 8001
DEFAULT_PUBLIC_KEY_FILE = "/etc/vram-agent/keys.pem"
STATE_DIRECTORY = "/var/lib/vram-agent"
MAX_TOKEN_LIFETIME_SECONDS = 60

DnsLabel = Annotated[
    str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)
]


class Runtime(StrEnum):
    """Which library loads and runs a model."""

    WHISPER = "Whisper"
    FUNASR = "FunASR"
    ONNX = "ONNX"
    TORCH = "Torch"
    TRANSFORMERS = "Transformers"
    PYTHON = "Python"


class Tier(StrEnum):
    """Where the weights of a model are now."""

    VRAM = "VRAM"
    PINNED_HOST = "PinnedHost"
    HOST = "Host"
    DISK = "Disk"


class OffloadTier(StrEnum):
    """Where the weights go when a model leaves VRAM."""

    PINNED_HOST = "PinnedHost"
    HOST = "Host"
    DISK = "Disk"


class LoadPolicy(StrEnum):
    """When a model is loaded first."""

    LAZY = "Lazy"
    EAGER = "Eager"


class AfterTask(StrEnum):
    """What happens to a model when its last task has ended."""

    OFFLOAD = "Offload"
    KEEP = "Keep"


class AfterCrash(StrEnum):
    """What ``vram-agent run`` does when its command ends by a fault of its own."""

    END = "End"
    RESTART = "Restart"


class ModelState(StrEnum):
    """Where a model is in its life."""

    ABSENT = "Absent"
    LOADING = "Loading"
    RESIDENT = "Resident"
    OFFLOADING = "Offloading"
    OFFLOADED = "Offloaded"
    RESTORING = "Restoring"
    FAILED = "Failed"


class LoadStep(StrEnum):
    """What is being done while a model is Loading or Restoring."""

    IMPORTING = "Importing"
    READING = "Reading"
    COPYING_TO_HOST = "CopyingToHost"
    STARTING_PROCESS = "StartingProcess"
    COPYING_TO_DEVICE = "CopyingToDevice"
    BUILDING_SESSION = "BuildingSession"


class DeviceKind(StrEnum):
    """What kind of memory a device has."""

    CUDA = "CUDA"
    MIG = "MIG"
    CPU = "CPU"


class DevicePreference(StrEnum):
    """Which device an agent uses; Auto takes CUDA where there is one."""

    AUTO = "Auto"
    CUDA = "CUDA"
    CPU = "CPU"


class DirtyAction(StrEnum):
    """What follows where a device is in use before the agent's first context."""

    REPORT = "Report"
    WAIT = "Wait"
    REFUSE = "Refuse"


class ResidualSource(StrEnum):
    """How far a residual can be trusted. A restart never rests on UNKNOWN."""

    EXCLUSIVE = "Exclusive"
    SELF = "Self"
    PROCESS = "Process"
    UNKNOWN = "Unknown"


class AgentMode(StrEnum):
    """How the agent lives beside the application."""

    SERVE = "Serve"
    RUN = "Run"
    EMBED = "Embed"


class ActionStep(StrEnum):
    """A remedy that the agent itself carries out."""

    RECYCLE = "Recycle"
    IN_PLACE = "InPlace"


class ActionState(StrEnum):
    """How far an action of the agent has come."""

    DRAINING = "Draining"
    ACTING = "Acting"
    DONE = "Done"
    FAILED = "Failed"
