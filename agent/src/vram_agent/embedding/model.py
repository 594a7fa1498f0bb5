"""One model of the embedding process: made by its factory, moved in place, dropped.

Why it exists: everything that blocks about a model, in one class whose methods run in a worker
thread, one at a time. Called by ``group.py``. It knows neither the supervisor nor who uses the
model. There is no process to end here, so what goes must go by losing its references: whatever the
application still holds on to is left whole, and said.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable

from vram_agent.backend import Moved
from vram_agent.devices.base import MIB, DeviceMemory, OutOfDeviceMemoryError
from vram_agent.engine.arena import Arena
from vram_agent.engine.deferred import defer_sessions
from vram_agent.engine.scrub import scrub, trim_malloc
from vram_agent.engine.weights import CombinedWeights, Weights
from vram_agent.errors import AgentError, ModelFailedError, NoVramError


class EmbeddedModel:
    """The object of one name while there is one. Its methods block; call one at a time."""

    def __init__(self, name: str, factory: Callable[[], object]) -> None:
        self.name = name
        self._factory = factory
        self._weights: Weights | None = None
        self._arena: Arena | None = None
        self.value: object = None
        self.host_bytes = 0
        self.stray_bytes = 0
        self.vram_bytes: int | None = None
        """What it holds on the device; None while it is not there."""

    @property
    def is_made(self) -> bool:
        """Whether the object exists."""
        return self._weights is not None

    def make(self, memory: DeviceMemory) -> str:
        """Call the factory and take its weights into host memory; return words on anything odd.

        Raises ModelFailedError with the factory's reason, and NoVramError where that is the
        device's memory; nothing is kept then.
        """
        arena = Arena(self.name)
        try:
            value, weights = self._call_factory(arena)
        except (Exception, SystemExit) as error:  # a factory may raise anything
            failure = self._explain(memory, error, "its factory raised")
            forget_frames(error)
            gc.collect()
            arena.let_go()
            scrub(memory, ())
            raise failure from None
        self._weights, self._arena, self.value = weights, arena, value
        self.host_bytes = arena.used_bytes
        # What the factory left in the allocator's cache is room for the weights.
        memory.empty_cache()
        trim_malloc()
        return self._weights.notes

    def restore(self, memory: DeviceMemory, threads: int) -> Moved:
        """Bring a made model onto the device. Idempotent.

        Raises NoVramError, the model then stays as it was, or ModelFailedError, it is then dropped.
        """
        if self._weights is None:
            raise ModelFailedError(f"model {self.name} was dropped meanwhile; use it again")
        began = time.monotonic()
        try:
            self.vram_bytes = self._weights.restore(memory, threads)
        except Exception as error:  # whatever a library raises
            failure = self._explain(memory, error, "it could not be brought onto the device:")
            forget_frames(error)
            if not isinstance(failure, NoVramError):
                self.drop(memory)
            scrub(memory, ())
            raise failure from None
        return Moved(
            vram_bytes=self.vram_bytes,
            seconds=time.monotonic() - began,
            message=memory.explain_copies(),
        )

    def offload(self, memory: DeviceMemory) -> Moved:
        """Take the weights off the device, and what tasks left there. Idempotent.

        Raises ModelFailedError; the model is then where it was.
        """
        if self._weights is None or self.vram_bytes is None:
            return Moved(vram_bytes=0, seconds=0.0)
        began = time.monotonic()
        try:
            left = self._weights.offload()
        except Exception as error:  # whatever a library raises
            raise ModelFailedError(
                f"model {self.name} could not be offloaded: {type(error).__name__}: {error}"
            ) from None
        self.vram_bytes = None
        self.stray_bytes = self._weights.stray_bytes
        self.scrub(memory)
        return Moved(
            vram_bytes=left.held_bytes, seconds=time.monotonic() - began, message=left.message
        )

    def scrub(self, memory: DeviceMemory) -> tuple[int, int]:
        """Empty caches; return the device memory held before and after, in bytes."""
        return scrub(memory, [self._forget] if self.is_made else [])

    def drop(self, memory: DeviceMemory) -> str:
        """Let go of the object, on the device and in host memory; return words on what stays.

        Idempotent. Never raises.
        """
        weights, arena = self._weights, self._arena
        if weights is None or arena is None:
            return ""
        try:
            weights.offload()
        except Exception as error:  # it goes all the same
            forget_frames(error)
        self._weights = self._arena = self.value = self.vram_bytes = weights = None
        self.host_bytes = self.stray_bytes = 0
        gc.collect()
        for region in arena.regions():
            memory.unpin(region.address, region.reserved_bytes)
        left_bytes = arena.let_go()
        scrub(memory, ())
        if not left_bytes:
            return ""
        return (
            f"{left_bytes / MIB:.0f} MiB of model {self.name} stay in host memory: the "
            f"application still refers to its tensors outside of a use"
        )

    def _call_factory(self, arena: Arena) -> tuple[object, Weights]:
        """A frame of its own, so that nothing of a load that failed is left."""
        with defer_sessions(arena) as sessions:
            value = self._factory()
        if value is None:
            raise ModelFailedError(
                f"model {self.name}: its factory returned None; return the model"
            )
        if "torch" not in sys.modules:
            return value, CombinedWeights(sessions)
        from vram_agent.engine.torch import TorchWeights  # noqa: PLC0415 - images may lack torch

        return value, CombinedWeights([TorchWeights(value, arena), *sessions])

    def _forget(self) -> None:
        """Let the model drop its own caches, if it says that it can."""
        forget = getattr(self.value, "forget", None)
        if not callable(forget):
            return
        try:
            forget()
        except Exception as error:  # a scrub must go on whatever one model does
            forget_frames(error)

    def _explain(self, memory: DeviceMemory, error: BaseException, words: str) -> AgentError:
        if isinstance(error, AgentError):
            return error
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        if isinstance(error, OutOfDeviceMemoryError) or memory.is_out_of_memory(error):
            return NoVramError(f"model {self.name} does not fit on the device: {said}")
        return ModelFailedError(f"model {self.name}: {words} {said}")


def forget_frames(error: BaseException) -> None:
    """Free the locals of the frames an error came through: they hold tensors on the device."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
