"""What the HTTP handlers share, as typed keys of the aiohttp application and request.

Why it exists: handlers get the supervisor, the limits and the decoder from the application and
from nowhere else, so a test composes them as ``app.py`` does. It knows no handler.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from vram_agent.metrics import AgentMetrics
from vram_agent.serving.audio import AudioDecoder
from vram_agent.serving.base import ModelServer
from vram_agent.serving.encoder import SpeechEncoder
from vram_agent.serving.limits import RequestLimits
from vram_agent.serving.places import Places

SERVER: web.AppKey[ModelServer] = web.AppKey("server", ModelServer)
LIMITS: web.AppKey[RequestLimits] = web.AppKey("limits", RequestLimits)
PLACES: web.AppKey[Places] = web.AppKey("places", Places)
METRICS: web.AppKey[AgentMetrics] = web.AppKey("metrics", AgentMetrics)
DECODER: web.AppKey[AudioDecoder] = web.AppKey("decoder", AudioDecoder)
ENCODER: web.AppKey[SpeechEncoder] = web.AppKey("encoder", SpeechEncoder)
CONVERSIONS: web.AppKey[asyncio.Semaphore] = web.AppKey("conversions", asyncio.Semaphore)
"""Held while a large body is turned into tensors, or back."""
STARTED_AT: web.AppKey[int] = web.AppKey("started_at", int)

MODEL: web.RequestKey[str] = web.RequestKey("model", str)
"""Name of the config's model that the request is for; the only source of the metric's label."""
BODY: web.RequestKey[bytes] = web.RequestKey("body", bytes)
"""The body of a control call, as its token was checked against it."""
