"""The generated reference of the runtimes: not out of date, and nothing without its meaning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from vram_agent.protocol import Runtime
from vram_agent.runtimes.base import TEXT, Option, Reference
from vram_agent.runtimes.reference import PATH, IncompleteReferenceError, _render

ROOT = Path(__file__).parents[4]


def test_the_generated_page_is_up_to_date(tmp_path: Path) -> None:
    # In a process of its own: importing every library makes warnings and takes memory.
    done = subprocess.run(
        [sys.executable, "-m", "vram_agent.runtimes.reference", "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / PATH).read_text(encoding="utf-8")
    assert (ROOT / PATH).read_text(encoding="utf-8") == written, "run make generate"


def reference(**options: Option) -> Reference:
    return Reference(library="x", extra="x", sources=("x",), tasks={}, options=options)


def test_an_option_without_a_meaning_is_named() -> None:
    with pytest.raises(IncompleteReferenceError, match="option fp16 of runtime Torch has no mean"):
        list(_render(Runtime.TORCH, reference(fp16=TEXT)))


def test_an_option_is_a_row_with_its_values_default_and_meaning() -> None:
    lines = list(_render(Runtime.TORCH, reference(a=TEXT.means("b|c", "d"), e=TEXT.means("f"))))
    assert r"| `a` | a text | d | b\|c |" in lines
    assert "| `e` | a text | none | f |" in lines
