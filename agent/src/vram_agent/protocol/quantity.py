"""Kubernetes quantities of bytes, as people write them. Pure."""

from __future__ import annotations

import functools
import re
from decimal import Decimal, InvalidOperation
from typing import Annotated

from msgspec import Meta

Quantity = Annotated[
    str,
    Meta(
        pattern=r"^([0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?)?$",
        max_length=32,
    ),
]
_SUFFIXES = {
    "": 1,
    **{suffix: 1024 ** (n + 1) for n, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
    **{suffix: 1000 ** (n + 1) for n, suffix in enumerate(("k", "M", "G", "T", "P", "E"))},
}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E|)$")


class InvalidQuantityError(ValueError):
    """A text is no Kubernetes quantity of bytes; the message names it and shows a good one."""


@functools.lru_cache(maxsize=256)
def parse_quantity(text: str) -> int:
    """Return the bytes that a Kubernetes quantity such as ``512Mi`` or ``1.5G`` stands for.

    Raises InvalidQuantityError. Fractions of a byte are rounded up, as the apiserver does. What
    was asked lately is remembered: a config's few quantities are part of every decision.
    """
    match = _QUANTITY.match(text.strip())
    if match is None:
        raise InvalidQuantityError(f"{text!r} is not a quantity of bytes; write for example 3Gi")
    try:
        value = Decimal(match[1]) * _SUFFIXES[match[2]]
    except InvalidOperation as error:  # pragma: no cover - the pattern admits digits only
        raise InvalidQuantityError(f"{text!r} is not a quantity of bytes") from error
    return int(value.to_integral_value(rounding="ROUND_CEILING"))


def format_quantity(number_of_bytes: int) -> str:
    """Return bytes as the shortest exact binary quantity, ``0`` for none."""
    for suffix in ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki"):
        unit = _SUFFIXES[suffix]
        if number_of_bytes and number_of_bytes % unit == 0:
            return f"{number_of_bytes // unit}{suffix}"
    return str(number_of_bytes)
