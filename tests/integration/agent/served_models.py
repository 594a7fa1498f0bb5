"""Models of the Python runtime for the clients' tests; loaded by templates by ``options.path``."""

from __future__ import annotations

from typing import Any

import numpy as np
from vram_agent.errors import BadInputError

RATE_HERTZ = 22_050


class Echo:
    """Gives back what it gets, of any datatype, and refuses what its parameters tell it to."""

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        if "refuse" in parameters:
            raise BadInputError(parameters["refuse"])
        return inputs


def make_echo() -> Echo:
    return Echo()
