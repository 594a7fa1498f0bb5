"""The Kustomize base: what the chart makes of its defaults, without what only helm needs.

``python -m tests.chart.kustomize`` writes it; a test holds it to the chart.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.chart.conftest import NAMESPACE, ROOT, Helm
from tests.cluster import build

BASE = ROOT / "deploy/kustomize/base"
FILE = BASE / "vram-operator.yaml"
HEADER = "# Generated from the chart; change that, then run: make generate\n"
_OF_HELM = {"helm.sh/chart", "app.kubernetes.io/managed-by"}


def rendered(helm: Helm) -> str:
    """Return the base's objects, CRDs first."""
    objects = [_plain(one) for one in helm.template()]
    objects.sort(key=lambda one: bool(one["kind"] != "CustomResourceDefinition"))
    return HEADER + yaml.safe_dump_all(objects, sort_keys=False, width=100)


def _plain(value: Any) -> Any:
    """Without helm's labels, which are in selectors and pod templates too, and its annotations."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _plain(one) for key, one in value.items() if key not in _OF_HELM}
    if list(kept.get("annotations") or []) == ["helm.sh/resource-policy"]:
        del kept["annotations"]
    return kept


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as home:
        FILE.write_text(rendered(Helm(build.helm(), Path(home))))
    print(f"wrote {FILE.relative_to(ROOT)}, for the namespace {NAMESPACE}")


if __name__ == "__main__":
    main()
