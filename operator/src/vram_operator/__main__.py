"""Entry point of ``vram-operator`` and ``python -m vram_operator``."""

from __future__ import annotations

import sys

from vram_operator import cli


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
