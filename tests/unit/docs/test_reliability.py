"""The fault matrix names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NAMED = re.findall(
    r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
)


def test_each_row_of_the_matrix_names_a_test() -> None:
    rows = [
        line
        for line in (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| Fault")
    ]
    assert len(rows) == len(NAMED) > 0


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_named_test_exists(file: str, name: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^(async def|def) {name}\(|^{name} = ", text, re.MULTILINE)
