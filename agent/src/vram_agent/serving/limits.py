"""The bounds on requests, as the config in force sets them.

Why it exists: the config may change while requests come in. Made by ``app.py``, moved by
``PUT /config``, read by every handler that reads a body.
"""

from __future__ import annotations

from vram_agent.protocol import AgentConfig, Limits, parse_quantity

_DEFAULT_REQUEST_BYTES = 64 * 1024**2


class RequestLimits:
    """The bounds on one request and on all of them; ``PUT /config`` moves them.

    ``request_bytes``: largest body. ``open_requests``: most requests with a task at once.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.request_bytes = _DEFAULT_REQUEST_BYTES
        self.open_requests = 1
        self.apply(config)

    def apply(self, config: AgentConfig) -> None:
        """Take the limits of a config that was accepted; those it leaves at the default stay."""
        if config.limits != Limits():
            quantity = config.limits.request_bytes
            self.request_bytes = parse_quantity(quantity) if quantity else _DEFAULT_REQUEST_BYTES
        self.open_requests = (config.queue.max_depth + 1) * max(1, len(config.models))
