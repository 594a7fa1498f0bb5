"""What happens to a tensor when its model leaves the device, by the tensor's path. Pure.

Why it exists: most tensors move, and some must not: scratch space is not worth a copy, and a table
that is used with host data belongs there. Only the model's owner knows which. Called by the
runtimes (to read them from a model's options) and by the torch engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Final

_ROOT = "model."


class TensorRule(StrEnum):
    """What the engine does with a tensor."""

    MOVE = "move"
    """Its values are kept in host memory while the model is off the device."""
    DROP = "drop"
    """Scratch: nothing is kept; it comes back in its shape, filled with zeros."""
    LEAVE = "leave"
    """It stays where it is, on the host or on the device."""


class TensorRules:
    """Patterns of paths, each with a rule; the first that matches counts.

    A pattern such as ``*.att_cache_buffer`` is matched against the path from the model's root
    (``encoder.blocks[0].attn``) with ``*``, ``?`` and ``[…]`` as a shell does; a literal ``[`` is
    ``[[]``.
    """

    def __init__(self, patterns: Mapping[str, TensorRule]) -> None:
        self._patterns = dict(patterns)

    def find(self, path: str) -> TensorRule | None:
        """Return the rule for a path as discovery writes it; None where no pattern matches."""
        name = path.removeprefix(_ROOT)
        return next(
            (rule for pattern, rule in self._patterns.items() if fnmatchcase(name, pattern)), None
        )


NO_RULES: Final = TensorRules({})


def is_rules(value: object) -> bool:
    """Whether an option's value can be read as rules."""
    return isinstance(value, dict) and all(
        isinstance(pattern, str) and rule in set(TensorRule) for pattern, rule in value.items()
    )


def read_rules(value: Mapping[str, Any]) -> TensorRules:
    """Return the rules in an option's value, for which `is_rules` holds."""
    return TensorRules({pattern: TensorRule(rule) for pattern, rule in value.items()})
