"""A model with a leak, on purpose: each request keeps memory that nothing will ever use again.

It stands for what people meet: a cache without a bound, an arena that only grows, a traceback that
holds its tensors. Offloading the weights does not give such memory back; ending the process does.
The leak is here, in the demo's own model code, and nowhere in the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


class Leaky:
    """Adds one to its input, and forgets to forget ``megabytes`` of scratch memory."""

    def __init__(self) -> None:
        self.weight = np.ones(1, dtype=np.float32)
        self._kept: list[bytearray] = []

    def infer(self, inputs: Arrays, parameters: dict[str, Any]) -> Arrays:
        """Return ``x + 1``; keep ``parameters["megabytes"]`` MB for ever."""
        scratch = bytearray(int(parameters.get("megabytes", 64)) * 1024 * 1024)
        scratch[::4096] = b"\x01" * len(scratch[::4096])  # touched, so that it is really there
        self._kept.append(scratch)
        return {"y": inputs["x"] + self.weight}


def create() -> Leaky:
    """Make the model; the agent calls this as ``leaky:create``."""
    return Leaky()
