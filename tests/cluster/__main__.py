"""``python -m tests.cluster``: the cluster from the command line, for make and for people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import build
from .cluster import Cluster, down, find, up
from .errors import ClusterError, ClusterUnavailable

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 is success, 1 a failure, 3 a machine that cannot run the level."""
    options = _parser().parse_args(arguments)
    try:
        return _dispatch(options)
    except ClusterUnavailable as error:
        print(f"cluster: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster", description="A local Kubernetes without Docker."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("up", "start it, or do nothing if it runs"),
        ("down", "remove it, whatever state it is in"),
        ("status", "say what runs; exit 1 if it does not"),
        ("kubectl", "run kubectl against it"),
        ("exec", "run a command in its network, where pod and service addresses work"),
        ("load-image", "import an image archive into the node"),
        ("build", "only build the programs, so that the next up is quick"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--dir", type=Path, default=Path(".cluster"), help="its directory (%(default)s)"
        )
        if name == "up":
            command.add_argument("--level", choices=["control-plane", "node"], default="node")
        elif name == "load-image":
            command.add_argument("archive", type=Path)
        elif name in {"kubectl", "exec"}:
            command.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _dispatch(options: argparse.Namespace) -> int:
    directory: Path = options.dir
    if options.command == "up":
        print(up(options.level, directory).kubeconfig)
    elif options.command == "down":
        gone = down(directory)
        print(f"removed {directory}" if gone else f"no cluster in {directory}")
    elif options.command == "build":
        for program in build.PROGRAMS:
            print(build.ensure_program(program))
    elif options.command == "status":
        return _status(find(directory), directory)
    else:
        return _use(options, _running(directory))
    return 0


def _status(cluster: Cluster | None, directory: Path) -> int:
    if cluster is None:
        print(f"no cluster runs in {directory}")
        return EXIT_FAILED
    print(f"level       {cluster.level}")
    print(f"kubeconfig  {cluster.kubeconfig}")
    print(f"network     {cluster.netns or 'of this machine'}")
    print(f"logs        {cluster.directory / 'logs'}")
    return 0


def _running(directory: Path) -> Cluster:
    cluster = find(directory)
    if cluster is None:
        raise ClusterError(
            f"no cluster runs in {directory}; start one with "
            f"`python -m tests.cluster up --dir {directory}`"
        )
    return cluster


def _use(options: argparse.Namespace, cluster: Cluster) -> int:
    command: list[str]
    if options.command == "load-image":
        print("\n".join(cluster.load_image(options.archive)))
        return 0
    given = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if options.command == "kubectl":
        command = [*cluster.kubectl_command(), *given]
    elif given:
        command = cluster.inside(given)
    else:
        raise ClusterError("exec needs a command, for example: exec -- curl http://10.96.0.1")
    try:
        # In the place of this process: signals and the terminal are the command's own.
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        raise ClusterError(f"cannot run {command[0]}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
