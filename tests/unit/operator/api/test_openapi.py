"""Structural schemas: what each construct of a type becomes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import pytest
from msgspec import Meta, field
from vram_operator.api import RestartMethod
from vram_operator.api_wire import Spec, Status
from vram_operator.openapi import UnsupportedTypeError, structural_schema


class Part(Spec, frozen=True, kw_only=True):
    """A part. Said in two sentences.

    And in a second paragraph, which is for programmers.
    """

    size: int = 3


class Every(Spec, frozen=True, kw_only=True):
    """Everything."""

    needed_here: str
    bounded: Annotated[str, Meta(min_length=1, max_length=9, pattern="^a", description="A.")] = "a"
    number: Annotated[int, Meta(ge=1, le=9)] = 2
    flag: bool = False
    kind: RestartMethod = RestartMethod.EVICT
    empty: str = ""
    at: datetime | None = None
    share: Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern="%$")] = 1
    free: dict[str, Any] = field(default_factory=dict)
    labels: Annotated[dict[str, str], Meta(max_length=2)] = field(default_factory=dict)
    parts: Annotated[list[Part], Meta(max_length=4)] = field(default_factory=list)
    part: Part = field(default_factory=Part)
    optional: Part | None = None


PART = {
    "type": "object",
    "description": "A part. Said in two sentences.",
    "properties": {"size": {"type": "integer", "format": "int64", "default": 3}},
}


def test_every_construct_has_its_structural_schema() -> None:
    assert structural_schema(Every) == {
        "type": "object",
        "description": "Everything.",
        "required": ["neededHere"],
        "properties": {
            "neededHere": {"type": "string"},
            "bounded": {
                "type": "string",
                "minLength": 1,
                "maxLength": 9,
                "pattern": "^a",
                "description": "A.",
                "default": "a",
            },
            "number": {
                "type": "integer",
                "format": "int64",
                "minimum": 1,
                "maximum": 9,
                "default": 2,
            },
            "flag": {"type": "boolean", "default": False},
            "kind": {
                "type": "string",
                "enum": ["Auto", "Recycle", "InPlace", "Evict", "Delete"],
                "default": "Evict",
            },
            "empty": {"type": "string"},
            "at": {"type": "string", "format": "date-time"},
            "share": {
                "x-kubernetes-int-or-string": True,
                "minimum": 1,
                "pattern": "%$",
                "default": 1,
            },
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "labels": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "maxProperties": 2,
            },
            "parts": {"type": "array", "items": PART, "maxItems": 4},
            "part": {**PART, "default": {}},
            "optional": PART,
        },
    }


class Written(Status, frozen=True, kw_only=True):
    """What the operator writes."""

    size: int = 3


def test_a_status_gets_no_defaults_since_absent_means_not_known_yet() -> None:
    assert structural_schema(Written)["properties"] == {
        "size": {"type": "integer", "format": "int64"}
    }


class Extended(Spec, frozen=True, kw_only=True):
    """An extended one."""

    part: Annotated[Part | None, Meta(extra_json_schema={"properties": {"size": {"x": 1}}})] = None


def test_an_extension_is_merged_at_any_depth() -> None:
    part = structural_schema(Extended)["properties"]["part"]
    assert part["properties"]["size"] == {
        "type": "integer",
        "format": "int64",
        "default": 3,
        "x": 1,
    }


class Impossible(Spec, frozen=True, kw_only=True):
    """A field that is two things at once."""

    value: int | bool | str


class Fractional(Spec, frozen=True, kw_only=True):
    """A field that Kubernetes would have nobody use."""

    value: float


@pytest.mark.parametrize("of", [Impossible, Fractional])
def test_a_type_without_a_structural_schema_is_an_error(of: type[Spec]) -> None:
    with pytest.raises(UnsupportedTypeError, match="no structural schema"):
        structural_schema(of)
