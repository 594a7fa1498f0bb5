"""``python -m handbook``: write the generated pages below a repository's root."""

from __future__ import annotations

import argparse
from pathlib import Path

from handbook import metrics, resources, runbooks

PAGES = {
    Path("docs/reference/resources.md"): resources.rendered,
    Path("docs/reference/metrics.md"): metrics.rendered,
    Path("docs/runbooks/README.md"): runbooks.rendered,
}


def main() -> None:
    """Write every page."""
    parser = argparse.ArgumentParser(prog="python -m handbook", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="the repository's root")
    root: Path = parser.parse_args().root
    for path, rendered in PAGES.items():
        (root / path).write_text(rendered(), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
