"""The operator's flags and environment, parsed once into one frozen object.

Each flag of ``vram-operator run`` has an environment variable ``VRAM_OPERATOR_<NAME>``; the flag
wins. Called by `cli` only: everything else is given a `Settings`. Knows no Kubernetes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vram_operator.logs import LogFormat

ENVIRONMENT_PREFIX = "VRAM_OPERATOR_"
_DURATION = re.compile(r"^([0-9]+)(s|m|h|d|)$")
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_DNS_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")


class SettingsError(ValueError):
    """A flag or variable has a value that cannot be used; the message is one line for its user."""


@dataclass(frozen=True)
class Limit:
    """A number of pods: an absolute one, or a percentage of all."""

    number: int
    percent: bool

    def of(self, total: int) -> int:
        """Return the limit for ``total`` pods, rounded down and at least 1."""
        return max(1, total * self.number // 100 if self.percent else self.number)

    def __str__(self) -> str:
        return f"{self.number}%" if self.percent else str(self.number)


@dataclass(frozen=True)
class Settings:
    """What a person can set when the operator starts. Times are seconds."""

    namespaces: tuple[str, ...] = ()
    agent_image: str = ""
    poll_interval_seconds: float = 10.0
    max_concurrent_restarts: Limit = Limit(10, percent=True)
    schedule_jitter_seconds: float = 30.0
    restart_ttl_seconds: float = 7 * 86_400.0
    allow_delete: bool = False
    metrics_port: int = 8080
    lease_name: str = "vram-operator"
    log_format: LogFormat = LogFormat.JSON
    dry_run: bool = False


def parse_seconds(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``15m``, ``12h`` or ``7d``."""
    match = _DURATION.match(text)
    if match is None:
        raise ValueError("is no duration; write seconds, or for example 30m, 12h or 7d")
    return float(int(match[1]) * _UNIT_SECONDS[match[2]])


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = parse_seconds(text)
    if not 0.1 <= seconds <= 3600:
        raise ValueError("is not between 0.1 and 3600 seconds")
    return seconds


def _limit(text: str) -> Limit:
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    if not number.isdecimal() or int(number) < 1 or (percent and int(number) > 100):
        raise ValueError("is neither a number from 1 up nor a percentage such as 10%")
    return Limit(int(number), percent)


def _switch(text: str) -> bool:
    lowered = text.lower()
    if lowered in {"true", "1", "yes", "on"}:
        return True
    if lowered in {"false", "0", "no", "off", ""}:
        return False
    raise ValueError("is neither true nor false")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise ValueError("is no port; write a number from 0 (any free one) to 65535")
    return int(text)


def _name(text: str) -> str:
    if len(text) > 253 or not _DNS_NAME.match(text):
        raise ValueError("is no name of a Kubernetes object")
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_name(part.strip()) for part in text.split(",") if part.strip()))


def _log_format(text: str) -> LogFormat:
    try:
        return LogFormat(text)
    except ValueError:
        raise ValueError("is neither json nor console") from None


@dataclass(frozen=True)
class Flag:
    """One flag: ``name`` without dashes, the field it fills, how it is read."""

    name: str
    field: str
    parse: Callable[[str], Any]
    help: str
    metavar: str = ""

    @property
    def variable(self) -> str:
        """The environment variable of the flag."""
        return ENVIRONMENT_PREFIX + self.name.upper().replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """Is the flag one that takes no value?"""
        return self.parse is _switch

    @property
    def is_repeatable(self) -> bool:
        """May the flag be given more than once?"""
        return self.parse is _names


FLAGS: tuple[Flag, ...] = (
    Flag("namespace", "namespaces", _names, "serve only this namespace (repeatable)", "NAME"),
    Flag("agent-image", "agent_image", str, "image of templates that name none", "IMAGE"),
    Flag(
        "poll-interval",
        "poll_interval_seconds",
        _interval,
        "seconds between reports of an agent; nearer a threshold a half, far from it three times",
        "SECONDS",
    ),
    Flag(
        "max-concurrent-restarts",
        "max_concurrent_restarts",
        _limit,
        "most pods of all workloads in a restart at a time, a number or a percentage",
        "N|N%",
    ),
    Flag(
        "schedule-jitter",
        "schedule_jitter_seconds",
        parse_seconds,
        "scheduled restarts are spread over this many seconds",
        "SECONDS",
    ),
    Flag(
        "restart-ttl",
        "restart_ttl_seconds",
        parse_seconds,
        "finished GPUPodRestarts are removed after this time, such as 7d",
        "DURATION",
    ),
    Flag("allow-delete", "allow_delete", _switch, "let restarts delete pods as the last step"),
    Flag(
        "metrics-port",
        "metrics_port",
        _port,
        "port of /metrics, /healthz and /readyz; 0 takes a free one",
        "PORT",
    ),
    Flag("lease-name", "lease_name", _name, "Lease that elects the active replica", "NAME"),
    Flag("log-format", "log_format", _log_format, "form of the log", "json|console"),
    Flag("dry-run", "dry_run", _switch, "decide and record everything, restart nothing"),
)


def from_texts(flags: Mapping[str, str | Sequence[str]], environ: Mapping[str, str]) -> Settings:
    """Build the settings from flag values by flag name and from the environment; flags win.

    Raises SettingsError that names the flag or variable and what a good value looks like.
    """
    values: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.name in flags:
            given = flags[flag.name]
            text, origin = given if isinstance(given, str) else ",".join(given), f"--{flag.name}"
        elif flag.variable in environ:
            text, origin = environ[flag.variable], flag.variable
        else:
            continue
        try:
            values[flag.field] = flag.parse(text)
        except ValueError as error:
            raise SettingsError(f"{origin}: {text!r} {error}") from error
    return Settings(**values)
