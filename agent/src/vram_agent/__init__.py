"""The per-pod agent of vram-operator: gives a GPU's memory back when its models are idle.

Applications that embed it import ``Manager`` and ``add_arguments`` from here. They come when they
are asked for: the supervisor of ``vram-agent serve`` is in this package too, and stays small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vram_agent.embed import Manager, add_arguments

__version__ = "0.1.0"
__all__ = ["Manager", "__version__", "add_arguments"]


def __getattr__(name: str) -> Any:
    """Import the library at its first use."""
    if name in {"Manager", "add_arguments"}:
        return getattr(importlib.import_module("vram_agent.embed"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
