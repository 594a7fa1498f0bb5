"""The operator as a next version of it may be: it makes other pods of the same workload."""

from __future__ import annotations

import sys
from typing import Any

from vram_operator.cli import main
from vram_operator.core import resources, upkeep

NEW_VARIABLE = {"name": "NEW_IN_THIS_VERSION", "value": "1"}
_render = resources.make_deployment


def make_deployment(*arguments: Any) -> dict[str, Any]:
    manifest = _render(*arguments)
    spec = manifest["spec"]["template"]["spec"]
    spec["containers"][0]["env"].append(NEW_VARIABLE)
    spec["containers"][0]["readinessProbe"]["periodSeconds"] = 2
    spec["enableServiceLinks"] = False
    return manifest


if __name__ == "__main__":
    vars(upkeep)["make_deployment"] = make_deployment
    sys.exit(main())
