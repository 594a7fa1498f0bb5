"""Models without management: made at their first use, and kept as they are.

Why it exists: an application that has the Manager in its code runs unchanged where its user did not
ask for management: no thread, no moved weights, no port. Called by ``embed.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vram_agent.errors import AgentError, ModelFailedError, NoSuchModelError


class Unmanaged:
    """Objects by name. Any thread may call."""

    def __init__(self) -> None:
        self._models: dict[str, _Kept] = {}

    def register(self, name: str, factory: Callable[[], object]) -> None:
        """Add a model. Raises ValueError where there is one of that name."""
        if name in self._models:
            raise ValueError(f"a model named {name!r} is registered already")
        self._models[name] = _Kept(name, factory)

    def get(self, name: str) -> object:
        """Return the object, made now if there is none. Blocks while it is made.

        Raises NoSuchModelError, and ModelFailedError where the factory raised; the next call tries
        again.
        """
        kept = self._models.get(name)
        if kept is None:
            known = ", ".join(self._models) or "none"
            raise NoSuchModelError(f"no model {name[:100]!r}; registered are: {known}")
        return kept.get()


class _Kept:
    def __init__(self, name: str, factory: Callable[[], object]) -> None:
        self._name = name
        self._factory = factory
        self._lock = threading.RLock()
        self._value: object = None

    def get(self) -> object:
        with self._lock:
            if self._value is None:
                try:
                    self._value = self._factory()
                except AgentError:
                    raise
                except Exception as error:
                    raise ModelFailedError(
                        f"model {self._name}: its factory raised {type(error).__name__}: {error}"
                    ) from error
                if self._value is None:
                    raise ModelFailedError(
                        f"model {self._name}: its factory returned None; return the model"
                    )
            return self._value
