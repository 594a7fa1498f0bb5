"""The two ways in which a cluster does not come up; their types say who is to act.

Everything in this package raises these. It imports nothing from the package.
"""

from __future__ import annotations


class ClusterError(RuntimeError):
    """Something failed that should have worked; the message says what, where and what to do."""


class ClusterUnavailable(ClusterError):  # noqa: N818 - a state of the machine, not a fault
    """This machine cannot run the level that was asked for.

    The message is one line: what is missing and what to do instead. Tests skip on it outside CI
    and fail on it when ``CI=true``.
    """
