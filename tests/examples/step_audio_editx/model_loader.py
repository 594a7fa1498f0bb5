"""Upstream's words for where models come from."""

from __future__ import annotations


class ModelSource:
    LOCAL = "local"
    AUTO = "auto"
