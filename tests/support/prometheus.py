"""A real Prometheus that scrapes what a test names, and what it answers."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.cluster.errors import ClusterError

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a graph: its labels, and (Unix seconds, value) where it has a number."""

    labels: Mapping[str, str]
    points: Points


@dataclass(frozen=True)
class Target:
    """Where to scrape, with the labels that service discovery would give it."""

    address: str
    job: str
    labels: Mapping[str, str]


class Prometheus:
    """One server with its data in ``folder``; scrapes once in a second."""

    def __init__(self, program: Path, folder: Path, rules: Path) -> None:
        self._program = program
        self._folder = folder
        self._rules = rules
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, targets: list[Target]) -> None:
        """Scrape ``targets`` until `stop`. Returns before the first scrape."""
        config = self._folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config(targets)))
        with (self._folder / "prometheus.log").open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                self._program,
                f"--config.file={config}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
                stdout=output,
                stderr=output,
            )

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    def _config(self, targets: list[Target]) -> dict[str, Any]:
        return {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(self._rules)],
            "scrape_configs": [
                {
                    "job_name": target.job,
                    # The operator's metrics name the namespace of the workload.
                    "honor_labels": True,
                    "static_configs": [
                        {"targets": [target.address], "labels": dict(target.labels)}
                    ],
                }
                for target in targets
            ],
        }

    async def get(self, path: str, **parameters: str) -> Any:
        """Return ``data`` of an answer of the HTTP API. Raises ClusterError with its complaint."""
        assert self._process is not None
        if self._process.returncode is not None:
            raise ClusterError(f"Prometheus ended:\n{self.log}")
        async with (
            aiohttp.ClientSession() as session,
            session.get(
                f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters
            ) as response,
        ):
            if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                response.raise_for_status()
            answer = json.loads(await response.text())
        if answer["status"] != "success":
            raise ClusterError(f"{parameters}: {answer['error']}")
        return answer["data"]

    @property
    def log(self) -> str:
        return (self._folder / "prometheus.log").read_text()

    async def is_scraping(self) -> bool:
        """Has every target been scraped with success?"""
        try:
            found = (await self.get("targets", state="active"))["activeTargets"]
        except aiohttp.ClientError:  # it starts
            return False
        return bool(found) and all(target["health"] == "up" for target in found)

    async def value(self, expression: str) -> float:
        """Return the sum of what an expression is now; 0 where it is nothing."""
        found = (await self.get("query", query=f"sum({expression})"))["result"]
        return float(found[0]["value"][1]) if found else 0.0

    async def between(self, start: float, end: float, expression: str) -> list[Series]:
        """Return the lines of an expression, a point for each second; NaN is no point."""
        found = await self.get(
            "query_range", query=expression, start=str(start), end=str(end), step="1"
        )
        lines = [
            Series(one["metric"], [(float(at), float(value)) for at, value in one["values"]])
            for one in found["result"]
        ]
        finite = (
            Series(line.labels, [point for point in line.points if math.isfinite(point[1])])
            for line in lines
        )
        return [line for line in finite if line.points]
