"""Effectively once, model-checked: as much of `Trouble` as each run of the tests has time for."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.operator.once.trouble import Trouble

Trouble.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTrouble = pytest.mark.timeout(300)(Trouble.TestCase)
