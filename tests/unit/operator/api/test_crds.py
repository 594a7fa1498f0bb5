"""The generated CRDs: not out of date, and described throughout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from vram_operator import crds

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(("path", "text"), crds.rendered().items(), ids=str)
def test_a_generated_file_is_up_to_date(path: Path, text: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == text, "run make generate"


def test_the_files_hold_what_the_command_prints() -> None:
    files = sorted((ROOT / "crds").iterdir())
    assert [path.name for path in files] == [
        "vram.dev_gpumodelworkloads.yaml",
        "vram.dev_gpupodrestarts.yaml",
    ]
    assert [yaml.safe_load(path.read_text()) for path in files] == crds.crds()


def properties(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, one in schema.get("properties", {}).items():
        yield f"{path}.{name}", one
        yield from properties(one, f"{path}.{name}")
    if "items" in schema:
        yield from properties(schema["items"], f"{path}[]")


def all_properties() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for crd in crds.crds():
        kind = crd["spec"]["names"]["kind"]
        schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        found |= dict(properties(schema, kind))
    return found


def test_every_field_has_a_description_that_is_a_sentence() -> None:
    # The apiserver describes metadata itself.
    described = {path: one for path, one in all_properties().items() if "metadata" not in path[-8:]}
    poor = [path for path, one in described.items() if not one.get("description", "").endswith(".")]
    assert poor == []
    assert len(described) > 90


def test_every_string_and_list_of_a_spec_is_bounded() -> None:
    unbounded = [
        path
        for path, one in all_properties().items()
        if ".spec" in path
        and (
            (one.get("type") == "string" and not {"maxLength", "enum", "format"} & one.keys())
            or (one.get("type") == "array" and "maxItems" not in one)
        )
    ]
    assert unbounded == []


def test_a_status_has_no_defaults() -> None:
    assert [
        path for path, one in all_properties().items() if ".status" in path and "default" in one
    ] == []
