"""A model that keeps what it should give back, for the runtime Python of a real agent."""

from __future__ import annotations

from typing import Any

import numpy as np


class Leaky:
    """Each inference keeps as many MiB as it is told to."""

    inputs = (("mebibytes", "INT64", [1]),)
    outputs = (("kept", "INT64", [1]),)

    def __init__(self) -> None:
        self._kept: list[bytearray] = []

    def infer(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        size = int(inputs["mebibytes"][0]) * 1024 * 1024
        # Written to, so that every page is really there.
        self._kept.append(bytearray(b"x") * size)
        return {"kept": np.array([len(self._kept)], dtype=np.int64)}


def make() -> Leaky:
    return Leaky()
