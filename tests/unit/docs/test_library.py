"""The page of the library says what the library does: its examples run, its options are those."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vram_agent import embed
from vram_agent.embed import Manager, ManagerOptions, ModelOptions
from vram_agent.protocol import ModelSpec

PAGE = (Path(__file__).parents[3] / "docs/library.md").read_text(encoding="utf-8")
EXAMPLES: list[tuple[str, str]] = re.findall(
    r"^<!-- example -->\n```python\n(.*?)^```\n(?:\n```\n(.*?)^```$)?",
    PAGE,
    re.DOTALL | re.MULTILINE,
)


def documented(after: str) -> dict[str, str]:
    """The table after a line of the page: option → what its second column says."""
    table = re.search(r"(?:^\|.*\n)+", PAGE[PAGE.index(after) :], re.MULTILINE)
    assert table is not None
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table[0], re.MULTILINE))


def test_every_block_of_python_is_run() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == 5


@pytest.mark.parametrize(
    ("code", "output"), EXAMPLES, ids=[f"example {n}" for n in range(1, len(EXAMPLES) + 1)]
)
def test_an_example_prints_what_the_page_says(code: str, output: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == output


def test_documented_options_of_a_manager_are_those_that_it_takes() -> None:
    assert set(documented("`Manager(…)` itself takes:")) == {
        "idle_timeout_seconds",
        *ManagerOptions.__annotations__,
    }


def test_documented_options_of_a_model_and_their_defaults_are_those_of_register() -> None:
    table = documented("`manager.register(name, factory, …)`")
    assert set(table) == set(ModelOptions.__annotations__)
    defaults = {name: value.strip('`"') for name, value in table.items()}
    spec: ModelSpec = embed._make_spec("a", list, {}, 600)
    assert defaults["after_task"] == spec.residency.after_task
    assert defaults["priority"] == str(spec.priority)
    assert (defaults["eager"], spec.residency.load) == ("False", "Lazy")
    assert spec.vram == ""


@pytest.mark.parametrize("option", ["queue_timeout_seconds", "vram_headroom", "enabled", "device"])
def test_a_documented_default_of_a_manager_is_the_real_one(option: str) -> None:
    value: Any = documented("`Manager(…)` itself takes:")[option].strip('`"')
    assert value == str(getattr(embed._Settings(idle_timeout_seconds=0), option))


def test_every_error_that_the_page_names_can_be_imported() -> None:
    from vram_agent import errors  # noqa: PLC0415 - only here

    named = set(re.findall(r"`(\w+Error)`", PAGE)) - {"RuntimeError"}
    assert named
    assert all(issubclass(getattr(errors, name), errors.AgentError) for name in named)


def test_the_page_names_every_public_method() -> None:
    for name in (name for name in vars(Manager) if not name.startswith("_")):
        assert re.search(rf"\b{name}\b", PAGE), name
