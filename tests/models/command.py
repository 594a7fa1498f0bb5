"""The command line that the scripts which train models share.

Called by `make_whisper`, `make_funasr` and `make_onnx`. It knows no model.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

Recipe = TypeVar("Recipe", bound=Any)


def read_command(default: Recipe, description: str, metavar: str) -> tuple[Path, Recipe]:
    """Return where to write, and the recipe: a dataclass of counts, each of which has a flag."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, metavar=metavar)
    for field in dataclasses.fields(default):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(default, field.name))
    chosen = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return chosen.pop("out"), dataclasses.replace(default, **chosen)
