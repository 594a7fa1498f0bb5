"""What programs exchange: ``GET /report`` and the control calls. Pure.

Everything is written, and unknown fields are ignored, so that agent and operator may differ in
version.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

from vram_agent.protocol.names import (
    REPORT_PROTOCOL,
    ActionState,
    ActionStep,
    AgentMode,
    DeviceKind,
    LoadStep,
    ModelState,
    ResidualSource,
    Runtime,
    Tier,
)


class _Wire(Struct, rename="camel", frozen=True, kw_only=True):
    """Base of what programs exchange: everything is written, unknown fields are ignored."""


class PodIdentity(_Wire, frozen=True, kw_only=True):
    """The pod an agent runs in; empty outside Kubernetes."""

    namespace: str = ""
    name: str = ""
    uid: str = ""


class AgentIdentity(_Wire, frozen=True, kw_only=True):
    """Which agent speaks. ``boot_id`` changes with PID 1, ``epoch`` counts recycles."""

    version: str
    mode: AgentMode
    boot_id: str = field(name="bootID")
    epoch: int
    started_at: str
    pod: PodIdentity


class DeviceReport(_Wire, frozen=True, kw_only=True):
    """One device as the driver sees it.

    ``baseline_bytes`` was in use before the agent's first context; ``dirty``: that is more than
    the config's ``vram.dirty.above``.
    """

    uuid: str
    index: int
    kind: DeviceKind
    total_bytes: int
    used_bytes: int
    exclusive: bool
    baseline_bytes: int = 0
    dirty: bool = False


class MemoryClasses(_Wire, frozen=True, kw_only=True):
    """The residual by what holds it; each class has its own remedy."""

    live_tensors: int = 0
    allocator_cache: int = 0
    runtime_arena: int = 0
    context_and_libraries: int = 0
    other_processes: int = 0
    unattributed: int = 0


class ScrubReport(_Wire, frozen=True, kw_only=True):
    """What the last scrub of GPU processes gave back; before and after are of those processes."""

    at: str
    before_bytes: int
    after_bytes: int
    reclaimed_bytes: int


class MemoryReport(_Wire, frozen=True, kw_only=True):
    """Device memory that the pod holds, and what of it is no resident model.

    ``host_limit_bytes`` is the container's memory limit, ``host_available_bytes`` what may still be
    taken of it, page cache included; both are null without a limit.
    """

    source: ResidualSource
    used_bytes: int
    model_bytes: int
    residual_bytes: int
    host_bytes: int
    classes: MemoryClasses
    last_scrub: ScrubReport | None = None
    host_limit_bytes: int | None = None
    host_available_bytes: int | None = None


class Transition(_Wire, frozen=True, kw_only=True):
    """The last change of a model's state; ``message`` says what was unusual about it."""

    kind: str
    seconds: float
    at: str
    message: str = ""


class LoadProgress(_Wire, frozen=True, kw_only=True, omit_defaults=True):
    """How far a load has come: the step, and its bytes. What is not known is left out."""

    step: LoadStep
    done_bytes: int | None = None
    total_bytes: int | None = None


class ModelReport(_Wire, frozen=True, kw_only=True):
    """One model as the supervisor knows it; ``progress`` while it is Loading or Restoring.

    ``needed_bytes``: what it is expected to hold in VRAM, declared or measured; 0 if not known yet.
    """

    name: str
    runtime: Runtime
    state: ModelState
    tier: Tier
    vram_bytes: int
    host_bytes: int
    in_flight: int
    queued: int
    last_used_at: str | None = None
    last_transition: Transition | None = None
    error: str | None = None
    progress: LoadProgress | None = None
    needed_bytes: int = 0


class ActionReport(_Wire, frozen=True, kw_only=True):
    """The last Recycle or InPlace that the agent was asked for."""

    restart_id: str = field(name="restartID")
    step: ActionStep
    state: ActionState
    at: str
    message: str = ""


class Report(_Wire, frozen=True, kw_only=True):
    """What an agent says of itself at ``GET /report``."""

    agent: AgentIdentity
    sequence: int
    observed_at: str
    config_generation: int
    devices: list[DeviceReport]
    memory: MemoryReport
    models: list[ModelReport]
    idle: bool
    idle_since: str | None
    draining: bool
    action: ActionReport | None = None
    protocol: str = REPORT_PROTOCOL


class RestartRequest(_Wire, frozen=True, kw_only=True):
    """Body of ``POST /recycle`` and ``POST /restart``."""

    restart_id: Annotated[str, Meta(min_length=1, max_length=253)] = field(name="restartID")
    drain_timeout_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 300
