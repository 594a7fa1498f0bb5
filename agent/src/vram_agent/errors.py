"""What can go wrong for a caller, as types: who is wrong, and whether to try again.

Raised by the supervisor and the backends, turned into HTTP answers by serving/ and nowhere else.
Every message says what happened, where and what to do.
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of all errors that a caller of the agent may see.

    ``status`` is the HTTP status, ``code`` a stable snake_case word, ``retry_after_seconds`` is
    None where trying again does not help.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds


class BadInputError(AgentError):
    """The request itself is wrong; the same request never succeeds."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NoSuchModelError(AgentError):
    """The agent's config has no model of that name."""

    status = 404
    code = "model_not_found"


class TooLargeError(AgentError):
    """The request is larger than limits.requestBytes."""

    status = 413
    code = "request_too_large"


class QueueFullError(AgentError):
    """As many requests wait for the model as queue.maxDepth admits."""

    status = 429
    code = "queue_full"


class WorkerDiedError(AgentError):
    """The process that ran this task ended under it; other requests are not affected."""

    status = 502
    code = "worker_died"


class DrainingError(AgentError):
    """The agent is told to stop and takes no new requests."""

    status = 503
    code = "draining"


class ModelFailedError(AgentError):
    """The model cannot be loaded or restored; the message is the reason."""

    status = 503
    code = "model_failed"


class NotResidentError(AgentError):
    """The model left VRAM (its GPU process ended) before the task began; nothing was done."""

    status = 503
    code = "not_resident"


class NoVramError(AgentError):
    """The model does not fit: into the budget at all, or beside what is in use for now."""

    status = 503
    code = "no_vram"


class QueueTimeoutError(AgentError):
    """The request waited longer than queue.timeoutSeconds."""

    status = 504
    code = "queue_timeout"


class NotSupportedError(AgentError):
    """The mode or device cannot do that call; the next rung of the ladder is meant."""

    status = 501
    code = "not_supported"


class TaskCancelledError(AgentError):
    """Whoever asked for the task has gone, so it was ended before its time."""

    status = 499
    code = "cancelled"


class TaskFailedError(AgentError):
    """The model's own code raised; the process lives on and the next task may run."""

    status = 500
    code = "task_failed"
