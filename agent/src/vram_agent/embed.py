"""The library: GPU memory given back by a process that is somebody else's.

Why it exists: an application that loads models in its own code gets what ``vram-agent serve`` gives
to the models that it hosts (load at first use, offload after it, eviction, report, drain) in a few
lines and without another process. Imported by applications as ``vram_agent.Manager``. Since no
process of ours holds the models, the tiers are PinnedHost and Disk only, and what a library keeps
on the device beyond its weights stays until the application ends.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import structlog

from vram_agent.config import ConfigError, parse_config
from vram_agent.devices import select_device
from vram_agent.embedding.core import Core
from vram_agent.embedding.unmanaged import Unmanaged
from vram_agent.embedding.uses import Ticket
from vram_agent.errors import NotSupportedError
from vram_agent.protocol import (
    CONTROL_PORT,
    DEFAULT_PUBLIC_KEY_FILE,
    AgentConfig,
    ControlPolicy,
    ModelSpec,
    Report,
)

DEFAULT_IDLE_TIMEOUT_SECONDS = 600
CLOSE_SECONDS = 25.0

logging.getLogger("vram_agent").addHandler(logging.NullHandler())


class ManagerOptions(TypedDict, total=False):
    """How a Manager differs from the defaults."""

    enabled: bool
    """False: models are made at their first use and kept; nothing is managed. Default: True."""
    device: Literal["Auto", "CUDA", "CPU"]
    """Default: Auto, CUDA where there is one."""
    vram_budget: str
    """The most that its models may hold together, such as ``"20Gi"``. Default: the device's."""
    vram_headroom: str
    """What is kept free on the device. Default: ``"512Mi"``."""
    queue_timeout_seconds: int
    """How long a use waits for its model. Default: 300."""


class ModelOptions(TypedDict, total=False):
    """How a model differs from the defaults."""

    after_task: Literal["Offload", "Keep"]
    """When its last use has ended: leave at once, or only for another model. Default: Offload."""
    idle_timeout_seconds: int | None
    """Unused for this long, it is dropped; 0: never. Default: the Manager's."""
    priority: int
    """Models of higher priority leave the device later. Default: 0."""
    vram: str
    """Its expected peak on the device, such as ``"8Gi"``. Default: learned at the first load."""
    eager: bool
    """Loaded when registered, as soon as there is room. Default: False."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlOptions:
    """Whose control calls are obeyed: as ``control`` in an agent's config."""

    public_key_file: str = DEFAULT_PUBLIC_KEY_FILE
    allow_unsigned: bool = False


class Manager:
    """Models by name, on the device while they are used.

    Making one reads the device's figures and makes no CUDA context; make it before the process
    touches CUDA, so that what the models hold can be told from what was there. Any thread and any
    event loop may call. It belongs to the process that made it: a fork must make its own.
    """

    def __init__(
        self,
        idle_timeout_seconds: int = DEFAULT_IDLE_TIMEOUT_SECONDS,
        **options: Unpack[ManagerOptions],
    ) -> None:
        """Raise ValueError for a bad option, NotSupportedError where the device is missing."""
        settings = _Settings(idle_timeout_seconds=idle_timeout_seconds, **options)
        self._idle_timeout_seconds = idle_timeout_seconds
        self._core: Core | None = None
        self._unmanaged = Unmanaged()
        if not settings.enabled:
            return
        config = settings.as_config()
        _send_logs_to_logging()
        device = select_device(config.device)
        for name, value in device.environment().items():
            # The driver reads its variables at its first call; malloc has read its own long ago.
            if name.startswith("CUDA_"):
                os.environ.setdefault(name, value)
        self._core = Core(config, device)
        # Not at exit, where the core ends by itself and waits for its thread.
        weakref.finalize(self, self._core.request_stop).atexit = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Make a Manager as the flags of ``add_arguments`` say."""
        return cls(idle_timeout_seconds=args.gpu_idle_timeout, enabled=args.enable_gpu_management)

    def register(
        self, name: str, factory: Callable[[], object], **options: Unpack[ModelOptions]
    ) -> None:
        """Add a model; ``factory()`` makes it, in a thread of the Manager, when it is first used.

        ``name`` is a DNS label. Raises ValueError for a bad name or option, or a name twice.
        """
        spec = _make_spec(name, factory, options, self._idle_timeout_seconds)
        if self._core is None:
            self._unmanaged.register(name, factory)
        else:
            self._core.register(spec, factory)

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """Have a model on the device for the length of a ``with`` block; yields the object.

        Blocks while it is loaded or restored. Nested in a thread or task that has the model
        already, it is only counted. Raises NoSuchModelError, ModelFailedError (the factory's
        reason; it is tried again after a pause), NoVramError, QueueFullError, QueueTimeoutError or
        DrainingError, and RuntimeError in a fork, in a factory and after ``close``. What the block
        raises comes out as it is.
        """
        if self._core is None:
            yield self._unmanaged.get(name)
            return
        ticket = Ticket(name, _find_holder())
        try:
            yield self._core.wait(self._core.enter(ticket))
        finally:
            self._core.leave(ticket)

    @asynccontextmanager
    async def ause(self, name: str) -> AsyncIterator[Any]:
        """Do as ``use`` without blocking the event loop. Cancelling gives up the place."""
        if self._core is None:
            yield await asyncio.to_thread(self._unmanaged.get, name)
            return
        ticket = Ticket(name, _find_holder())
        try:
            yield await asyncio.wrap_future(self._core.enter(ticket))
        finally:
            self._core.leave(ticket)

    def serve_control(
        self,
        host: str = "0.0.0.0",  # noqa: S104 - operator and kubelet call from outside of the pod
        port: int = CONTROL_PORT,
        control: ControlOptions | None = None,
    ) -> str:
        """Serve report, metrics, drain and restart to the operator; return ``host:port`` bound.

        Port 0 takes a free one. Anyone may read; calls that change something must be signed, as
        with ``vram-agent serve``. Nothing, and an empty text, where management is off. Raises
        ListenError where the address cannot be had, RuntimeError the second time.
        """
        if self._core is None:
            return ""
        wanted = control or ControlOptions()
        policy = ControlPolicy(
            public_key_file=wanted.public_key_file, allow_unsigned=wanted.allow_unsigned
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self._core.serve_control(address, policy)

    def report(self) -> Report:
        """Measure and return what ``GET /report`` says.

        Raises NotSupportedError where management is off.
        """
        if self._core is None:
            raise NotSupportedError("nothing is measured: GPU management is off in this process")
        return self._core.report()

    def close(self, grace_seconds: float = CLOSE_SECONDS) -> None:
        """Refuse new uses, wait for those that go on, drop the models and end the threads.

        Blocks. A use that outlasts the grace keeps its object. Idempotent; nothing in a fork.
        Raises RuntimeError where the caller itself uses a model.
        """
        if self._core is not None:
            self._core.close(_find_holder(), grace_seconds)

    def __enter__(self) -> Self:
        """Return the Manager; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the Manager's flags to an application's own parser."""
    group = parser.add_argument_group("GPU management")
    group.add_argument(
        "--enable-gpu-management",
        action="store_true",
        help="give the GPU's memory back while models are unused",
    )
    group.add_argument(
        "--gpu-idle-timeout",
        type=_seconds,
        default=DEFAULT_IDLE_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="drop a model that is unused for this long; 0: never (default: %(default)s)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    idle_timeout_seconds: int
    enabled: bool = True
    device: str = "Auto"
    vram_budget: str = ""
    vram_headroom: str = "512Mi"
    queue_timeout_seconds: int = 300

    def as_config(self) -> AgentConfig:
        """Return the config without models. Raises ValueError."""
        document = {
            "device": self.device,
            "vram": {"budget": self.vram_budget, "headroom": self.vram_headroom},
            "queue": {"timeoutSeconds": self.queue_timeout_seconds},
        }
        return _parse(document)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wishes:
    after_task: str = "Offload"
    idle_timeout_seconds: int | None = None
    priority: int = 0
    vram: str = ""
    eager: bool = False


def _make_spec(
    name: str, factory: Callable[[], object], options: ModelOptions, idle_timeout_seconds: int
) -> ModelSpec:
    wishes = _Wishes(**options)
    idle = wishes.idle_timeout_seconds
    source = f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"
    model = {
        "name": name,
        "runtime": "Python",
        "source": source,
        # It is made on the device, for all that the supervisor knows: it has no template.
        "options": {"loadsOn": "cuda"},
        "vram": wishes.vram,
        "priority": wishes.priority,
        "residency": {
            "load": "Eager" if wishes.eager else "Lazy",
            "afterTask": wishes.after_task,
            "offloadTier": "PinnedHost",
            "idleTimeoutSeconds": idle_timeout_seconds if idle is None else idle,
            "idleTier": "Disk",
        },
    }
    return _parse({"models": [model]}).models[0]


def _parse(document: dict[str, Any]) -> AgentConfig:
    try:
        return parse_config(document)
    except ConfigError as error:
        raise ValueError("; ".join(f.removeprefix("models[0].") for f in error.faults)) from None


def _find_holder() -> object:
    """Return the asyncio task that calls, else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.current_thread() if task is None else task


def _seconds(text: str) -> int:
    seconds = int(text)
    if seconds < 0:
        raise argparse.ArgumentTypeError("give seconds from 0 on")
    return seconds


@functools.cache
def _send_logs_to_logging() -> None:
    """Log through the standard library, under ``vram_agent``, where structlog is not set up.

    Its own default prints to stdout, which is the application's.
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
