"""Writes image archives that containerd imports and buildah reads, without a container tool.

The format is ``docker save``'s: layers, a config and ``manifest.json`` in a tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ImageConfig:
    """What runs in a container of the image; ``name`` is its full reference with a tag."""

    name: str
    entrypoint: Sequence[str] = field(default=())
    environment: Mapping[str, str] = field(default_factory=dict)


def architecture() -> str:
    """This machine's architecture as images call it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def write_program_image(archive: Path, config: ImageConfig, program: Path) -> None:
    """Write an image that has nothing but one static program, at ``/<its name>``."""
    layer = archive.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        info = tarfile.TarInfo(program.name)
        info.size, info.mode = program.stat().st_size, 0o755
        with program.open("rb") as content:
            tar.addfile(info, content)
    write_image(archive, config, layer)


def write_rootfs_image(archive: Path, config: ImageConfig, rootfs: Path) -> None:
    """Write an image of a whole file system; owners, modes, links and devices are kept."""
    layer = archive.with_suffix(".layer")
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in sorted(rootfs.iterdir()):
            tar.add(entry, arcname=entry.name)
    write_image(archive, config, layer)


def write_image(archive: Path, config: ImageConfig, layer: Path) -> None:
    """Write ``archive`` around the uncompressed tar ``layer``, which is used up."""
    with layer.open("rb") as content:
        layer_id = hashlib.file_digest(content, "sha256").hexdigest()
    document = {
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": list(config.entrypoint),
            "Env": [f"{name}={value}" for name, value in config.environment.items()],
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_id}"]},
        "history": [{"created_by": "tests/cluster"}],
    }
    content_bytes = json.dumps(document).encode()
    config_name = f"{hashlib.sha256(content_bytes).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [config.name], "Layers": [f"{layer_id}.tar"]}]
    with tarfile.open(archive, "w") as tar:
        _add(tar, config_name, content_bytes)
        tar.add(layer, arcname=f"{layer_id}.tar")
        _add(tar, "manifest.json", _encode(manifest))
    layer.unlink()


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
