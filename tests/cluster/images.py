"""Builds container images from Dockerfiles without Docker and without pulling anything.

The base is a Debian made by debootstrap, and buildah runs the Dockerfile with chroot isolation.
Called by the end-to-end tests and the demo; needs root. Archives are cached by content.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import archive, prerequisites
from .cache import cache_dir, content_key, ensure_entry, locked
from .errors import ClusterError
from .processes import tail

KEPT_LAYERS = 80
BASE_NAME = "localhost/vram-base"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
HOST_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
# Of what pip and uv are told on this machine, what must hold in a build too.
PIP_SETTINGS = {
    "PIP_INDEX_URL": "index-url",
    "PIP_EXTRA_INDEX_URL": "extra-index-url",
    "PIP_TRUSTED_HOST": "trusted-host",
    "PIP_DEFAULT_TIMEOUT": "timeout",
}


@dataclass(frozen=True)
class Recipe:
    """What to build. ``inputs`` are all files and folders that the Dockerfile copies.

    ``name`` is the image's reference without a tag, for example ``localhost/vram-agent``.
    """

    name: str
    dockerfile: Path
    context: Path
    inputs: Sequence[Path]
    build_args: Mapping[str, str] = field(default_factory=dict)

    def key(self, base: str) -> str:
        """Hash of everything that decides the image's content."""
        facts = [base, *(f"{name}={value}" for name, value in sorted(self.build_args.items()))]
        return content_key([self.dockerfile, *self.inputs], self.name, *facts)


@dataclass(frozen=True)
class Image:
    """An archive for `Cluster.load_image` and the reference that pods use."""

    reference: str
    archive: Path


def base_image() -> Image:
    """Return the Debian base image with Python, made now if it was not yet (40 s, 300 MB).

    It trusts what this machine trusts, so that builds work where the network inspects TLS.
    """
    authorities = HOST_AUTHORITIES.read_text() if HOST_AUTHORITIES.is_file() else ""
    key = content_key([], SUITE, PACKAGES, authorities)
    reference = f"{BASE_NAME}:{key}"
    entry = ensure_entry("image-base", key, lambda folder: _bootstrap(folder, reference))
    return Image(reference, entry / "image.tar")


def build_image(recipe: Recipe) -> Image:
    """Build a Dockerfile whose ``FROM`` is the build argument ``BASE_IMAGE``; cached by content.

    Blocks for as long as the Dockerfile takes. ``RUN`` steps have this machine's network and are
    told of its package index and certificates, none of which stays in the image.
    """
    base = base_image()
    key = recipe.key(base.reference)
    reference = f"{recipe.name}:{key}"
    kind = f"image-{recipe.name.rpartition('/')[2]}"
    entry = ensure_entry(kind, key, lambda folder: _bud(recipe, base, reference, folder))
    return Image(reference, entry / "image.tar")


def _bootstrap(folder: Path, reference: str) -> None:
    prerequisites.require_root_for("building images")
    prerequisites.ensure_programs(prerequisites.IMAGE_PROGRAMS)
    prerequisites.ensure_debian_keyring()
    print("cluster: making the base image with debootstrap; this happens once", file=sys.stderr)
    rootfs = folder / "rootfs"
    log = _log("debootstrap")
    mirror = os.environ.get("DEBIAN_MIRROR")
    _run(
        [
            *("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(rootfs)),
            *([mirror] if mirror else []),
        ],
        log,
        f"debootstrap from {mirror or 'its default mirror'} failed; set DEBIAN_MIRROR to a mirror "
        "of Debian that answers",
    )
    for needless in ("var/cache/apt", "var/lib/apt/lists"):
        for entry in (rootfs / needless).iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    if HOST_AUTHORITIES.is_file():
        shutil.copyfile(HOST_AUTHORITIES, rootfs / str(HOST_AUTHORITIES).lstrip("/"))
    config = archive.ImageConfig(
        reference,
        environment={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    archive.write_rootfs_image(folder / "image.tar", config, rootfs)
    shutil.rmtree(rootfs)


def _bud(recipe: Recipe, base: Image, reference: str, folder: Path) -> None:
    prerequisites.require_root_for("building images")
    prerequisites.ensure_programs(prerequisites.IMAGE_PROGRAMS)
    print(f"cluster: building {reference}", file=sys.stderr)
    started = time.monotonic()
    log = _log(f"image-{recipe.name.rpartition('/')[2]}")
    settings = folder / "settings"
    settings.mkdir()
    arguments = {**recipe.build_args, "BASE_IMAGE": base.reference}
    with locked("buildah"):
        if _buildah(["inspect", "--type=image", base.reference], None) != 0:
            _buildah(["pull", "--quiet", f"docker-archive:{base.archive}"], log)
            _forget_others(BASE_NAME, base.reference)
        _buildah(
            [
                *("bud", "--isolation=chroot", "--layers", "--pull-never"),
                *(f"--volume={path}:{target}:ro" for path, target in _settings(settings).items()),
                *(f"--build-arg={name}={value}" for name, value in arguments.items()),
                *("--file", str(recipe.dockerfile), "--tag", reference, str(recipe.context)),
            ],
            log,
        )
        target = folder / "image.tar"
        _buildah(
            ["push", "--disable-compression", reference, f"oci-archive:{target}:{reference}"], log
        )
        _forget_others(recipe.name, reference)
    shutil.rmtree(settings)
    print(f"cluster: built {reference} in {time.monotonic() - started:.0f} s", file=sys.stderr)


def _settings(folder: Path) -> dict[Path, str]:
    """Configuration of pip and uv that ``RUN`` steps see and the image does not keep."""
    pip = ["[global]", f"cert = {HOST_AUTHORITIES}", "disable-pip-version-check = true"]
    pip += [
        f"{setting} = {os.environ[name]}"
        for name, setting in PIP_SETTINGS.items()
        if os.environ.get(name)
    ]
    uv = ["native-tls = true"]
    if os.environ.get("PIP_INDEX_URL"):
        uv += ["[[index]]", f'url = "{os.environ["PIP_INDEX_URL"]}"', "default = true"]
    files = {"pip.conf": ("/etc/pip.conf", pip), "uv.toml": ("/etc/uv/uv.toml", uv)}
    mounted = {}
    for name, (target, lines) in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
        mounted[folder / name] = target
    return mounted


def _forget_others(name: str, reference: str) -> None:
    """Keep buildah's store bounded: of each image the newest, and so many layers to build upon.

    Pruning at once would drop the layers of all stages but the last, which are what makes the
    next build short.
    """
    for other in _list_images():
        if other.rpartition(":")[0] == name and other != reference:
            _buildah(["rmi", other], None)
    if len(_list_images("--all")) > KEPT_LAYERS:
        _buildah(["rmi", "--prune"], None)


def _list_images(*options: str) -> list[str]:
    command = [*_buildah_command(), "images", "--format={{.Name}}:{{.Tag}}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def _buildah_command() -> list[str]:
    """Buildah with a store of its own, in a mount namespace that keeps its mounts from leaking."""
    store = cache_dir() / "buildah"
    return [
        *("unshare", "--mount", "--propagation=slave", "--"),
        *("buildah", f"--root={store / 'store'}", f"--runroot={store / 'run'}"),
        *("--storage-driver", _driver(store)),
    ]


def _driver(store: Path) -> str:
    """Overlays where they can be; inside a container each layer is a whole copy instead."""
    store.mkdir(parents=True, exist_ok=True)
    return "vfs" if prerequisites.is_overlay(store) else "overlay"


def _buildah(arguments: Sequence[str], log: Path | None) -> int:
    """Run buildah; with a log a failure raises, without one the exit status is the answer."""
    command = [*_buildah_command(), *arguments]
    if log is None:
        return subprocess.run(command, capture_output=True, check=False).returncode
    _run(command, log, f"buildah {arguments[0]} failed")
    return 0


def _run(command: Sequence[str], log: Path, failure: str) -> None:
    with log.open("ab") as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0:
        raise ClusterError(f"{failure} (exit {done.returncode}). End of {log}:\n{tail(log)}")


def _log(name: str) -> Path:
    log = cache_dir() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    return log
