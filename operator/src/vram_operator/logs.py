"""Sets up structured logging once, for `__main__`.

Everything of the operator logs through structlog with fields; what libraries log through the
standard library comes out in the same form. kopf's own lines are held at warnings: it logs each
retry of a watch, and `health` says once what they mean.
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum

import structlog


class LogFormat(StrEnum):
    """How log lines look."""

    JSON = "json"
    CONSOLE = "console"


_QUIET_LOGGERS = ("kopf", "asyncio", "aiohttp.access", "kubernetes", "urllib3")
# kopf logs each attempt of a request that failed as an error. `health` says it once.
_REPEATED = ("Request attempt", "OS signals are ignored")


class _OnceFilter(logging.Filter):
    """Drops what kopf repeats for each attempt."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_REPEATED)


def configure(log_format: LogFormat) -> None:
    """Send every log line of this process to stderr in ``log_format``. Call once."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format is LogFormat.JSON:
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
        shared.append(structlog.processors.format_exc_info)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_OnceFilter())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
