"""The command ``vram-operator``: arguments in, exit status out.

Called by `__main__`. A bad flag or variable ends with one line and status 2, a cluster that cannot
be found with one line and status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

import yaml

from vram_operator import __version__, kube, logs
from vram_operator.crds import crds
from vram_operator.operate import Replica
from vram_operator.settings import FLAGS, Settings, SettingsError, from_texts
from vram_operator.signing import UnusableKeyError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="vram-operator",
        description="Declares GPU model workloads and restarts pods that leak device memory.",
    )
    top.add_argument("--version", action="version", version=f"vram-operator {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run the operator",
        description="Run the operator. Each flag is also an environment variable.",
    )
    for flag in FLAGS:
        text = f"{flag.help} [{flag.variable}]".replace("%", "%%")
        if flag.is_switch:
            run.add_argument(f"--{flag.name}", nargs="?", const="true", metavar="BOOL", help=text)
        elif flag.is_repeatable:
            run.add_argument(f"--{flag.name}", action="append", metavar=flag.metavar, help=text)
        else:
            run.add_argument(f"--{flag.name}", metavar=flag.metavar, help=text)
    commands.add_parser("crds", help="print the CustomResourceDefinitions")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parsed = vars(parser().parse_args(arguments))
    if parsed.pop("command") == "crds":
        print(yaml.safe_dump_all(crds(), sort_keys=False), end="")
        return 0
    given = {name.replace("_", "-"): value for name, value in parsed.items() if value is not None}
    try:
        settings = from_texts(given, os.environ)
    except SettingsError as error:
        print(f"vram-operator: {error}", file=sys.stderr)
        return 2
    logs.configure(settings.log_format)
    try:
        return asyncio.run(_run(settings))
    except (kube.ConnectionConfigError, UnusableKeyError) as error:
        print(f"vram-operator: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"vram-operator: cannot listen on port {settings.metrics_port}: {error}",
            file=sys.stderr,
        )
    return 1


async def _run(settings: Settings) -> int:
    return await Replica(settings, await kube.connect()).run()
