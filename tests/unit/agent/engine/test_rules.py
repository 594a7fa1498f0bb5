"""A model's owner says by path what happens to a tensor."""

from __future__ import annotations

import pytest
from vram_agent.engine.rules import TensorRule, is_rules, read_rules

RULES = {
    "encoder.kms": "leave",
    "*.att_cache_buffer": "drop",
    "layers[[]0].*": "move",
    "layers*": "leave",
}


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        pytest.param("model.encoder.kms", TensorRule.LEAVE, id="the whole path"),
        pytest.param("model.a.b.att_cache_buffer", TensorRule.DROP, id="a star crosses dots"),
        pytest.param("model.layers[0].weight", TensorRule.MOVE, id="a bracket, literally"),
        pytest.param("model.layers[1].weight", TensorRule.LEAVE, id="the first match counts"),
        pytest.param("model.Encoder.kms", None, id="case counts"),
        pytest.param("model.kms", None, id="no match, no rule"),
    ],
)
def test_the_first_pattern_that_matches_counts(path: str, rule: TensorRule | None) -> None:
    assert is_rules(RULES)
    assert read_rules(RULES).find(path) is rule


@pytest.mark.parametrize("value", [{"a": "swap"}, {"a": None}, {1: "move"}, ["a"], "move"])
def test_what_are_no_rules(value: object) -> None:
    assert not is_rules(value)
