"""A clock for tests that need one and no passing of time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tests.support.factories import NOW


@dataclass
class StoppedClock:
    """It is always NOW."""

    def now(self) -> datetime:
        return NOW

    def monotonic(self) -> float:
        return 0.0
