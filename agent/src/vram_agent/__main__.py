"""The command ``vram-agent``: its words, and nothing that takes long to import.

Why it exists: the entry point of the image and of a person's shell. Each command's own module is
imported when it is called, so that ``--version`` and a probe's ``report`` stay instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vram_agent import __version__

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INVALID = 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="vram-agent",
        description="Gives a GPU's memory back when its models are idle, and brings them back.",
    )
    parser.add_argument("--version", action="version", version=f"vram-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="host models and answer requests for them")
    serve.add_argument("--config", type=Path, metavar="FILE", help="an AgentConfig, YAML or JSON")
    serve.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=RUNTIME:SOURCE",
        help="a model without a config file; repeatable",
    )
    serve.add_argument("--device", choices=("Auto", "CUDA", "CPU"), help="default: the config's")
    serve.add_argument("--listen-serving", metavar="HOST:PORT", help="default 0.0.0.0:8000")
    serve.add_argument("--listen-control", metavar="HOST:PORT", help="default 0.0.0.0:8001")
    serve.add_argument(
        "--log-format", choices=("json", "console"), help="default: console on a terminal"
    )

    run = commands.add_parser(
        "run",
        help="wrap an application that is not ours",
        usage="vram-agent run [OPTIONS] -- COMMAND...",
    )
    run.add_argument("--config", type=Path, metavar="FILE", help="an AgentConfig, YAML or JSON")
    run.add_argument("--device", choices=("Auto", "CUDA", "CPU"), help="default: the config's")
    run.add_argument("--listen-control", metavar="HOST:PORT", help="default 0.0.0.0:8001")
    run.add_argument(
        "--log-format", choices=("json", "console"), help="default: console on a terminal"
    )

    report = commands.add_parser("report", help="print what an agent says of itself")
    report.add_argument("--url", default="http://127.0.0.1:8001", help="the agent's control port")
    report.add_argument("-o", "--output", choices=("table", "json"), default="table")
    report.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="again and again, so many seconds apart (2), until interrupted",
    )

    validate = commands.add_parser("validate", help="check a config file")
    validate.add_argument("file", type=Path, metavar="FILE")
    return parser


def split_wrapped(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what is ours, and the command after the first ``--`` of ``run``."""
    if list(arguments[:1]) != ["run"] or "--" not in arguments:
        return list(arguments), []
    place = list(arguments).index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text}: write seconds from 0.1 to 86400")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (failed) or 2 (invalid input).

    ``run`` returns that of the command that it wraps.
    """
    words, wrapped = split_wrapped(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if words[:1] == ["run"] and not wrapped and not {"-h", "--help"} & set(words):
        parser.error("run: write the command after --, as in: vram-agent run -- python app.py")
    options = parser.parse_args(words)
    if options.command == "run":
        from vram_agent.run import run_command  # noqa: PLC0415

        return run_command(options, wrapped)
    if options.command == "serve":
        from vram_agent.serve import serve_command  # noqa: PLC0415

        return serve_command(options)
    if options.command == "report":
        from vram_agent.report import report_command  # noqa: PLC0415

        return report_command(options.url, options.output, options.watch)
    return _validate(options.file)


def _validate(path: Path) -> int:
    from vram_agent.config import ConfigError, load_config  # noqa: PLC0415

    try:
        config = load_config(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_INVALID
    count = len(config.models)
    print(f"{path}: valid, {count} model{'' if count == 1 else 's'}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
