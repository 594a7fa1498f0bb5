"""The command ``vram-operator``: arguments in, exit status out.

Called by `__main__`. A bad flag or variable ends with one line and status 2, a cluster that cannot
be found with one line and status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable, Sequence

import yaml

from vram_operator import __version__, kube, logs
from vram_operator.cache import Key
from vram_operator.clock import SystemClock
from vram_operator.crds import crds
from vram_operator.explain import ExplainError, Question, answer
from vram_operator.operate import Replica
from vram_operator.settings import FLAGS, Flag, Settings, SettingsError, from_texts
from vram_operator.signing import UnusableKeyError

_DECISIVE = {
    "namespace",
    "agent-image",
    "poll-interval",
    "max-concurrent-restarts",
    "schedule-jitter",
    "restart-ttl",
    "allow-delete",
    "dry-run",
}
"""Flags that decisions rest on."""


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
    _add_flags(run, FLAGS)
    explaining = commands.add_parser(
        "explain",
        help="say what would be done for a workload, and why",
        description="Say what the operator would do for a workload now, and why. Changes nothing. "
        "Give the flags that the operator was started with.",
    )
    explaining.add_argument("workload", metavar="NAMESPACE/NAME", type=_workload)
    explaining.add_argument(
        "--listen",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="collect the agents' reports for so long first, as evidence takes more than one",
    )
    _add_flags(explaining, [flag for flag in FLAGS if flag.name in _DECISIVE])
    commands.add_parser("crds", help="print the CustomResourceDefinitions")
    return top


def _add_flags(to: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    for flag in flags:
        text = f"{flag.help} [{flag.variable}]".replace("%", "%%")
        if flag.is_switch:
            to.add_argument(f"--{flag.name}", nargs="?", const="true", metavar="BOOL", help=text)
        elif flag.is_repeatable:
            to.add_argument(f"--{flag.name}", action="append", metavar=flag.metavar, help=text)
        else:
            to.add_argument(f"--{flag.name}", metavar=flag.metavar, help=text)


def _workload(text: str) -> Key:
    namespace, slash, name = text.partition("/")
    if not (slash and namespace and name) or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME, as in lab/speech")
    return namespace, name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parsed = vars(parser().parse_args(arguments))
    command = parsed.pop("command")
    if command == "crds":
        print(yaml.safe_dump_all(crds(), sort_keys=False), end="")
        return 0
    workload, listen = parsed.pop("workload", None), parsed.pop("listen", 0.0)
    given = {name.replace("_", "-"): value for name, value in parsed.items() if value is not None}
    try:
        settings = from_texts(given, os.environ)
    except SettingsError as error:
        print(f"vram-operator: {error}", file=sys.stderr)
        return 2
    if command == "explain":
        return _main_explain(settings, Question(workload, listen))
    return _main_run(settings)


def _main_run(settings: Settings) -> int:
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


def _main_explain(settings: Settings, question: Question) -> int:
    try:
        print(asyncio.run(_explain(settings, question)))
    except (kube.ConnectionConfigError, ExplainError) as error:
        print(f"vram-operator: {error}", file=sys.stderr)
        return 1
    return 0


async def _explain(settings: Settings, question: Question) -> str:
    return await answer(await kube.connect(), settings, question, SystemClock())


async def _run(settings: Settings) -> int:
    return await Replica(settings, await kube.connect()).run()
