"""A Gradio demo with the usual fault: it keeps what every request made. It knows no agent."""

from __future__ import annotations

from typing import Any

import gradio
import numpy as np
import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE = 1024

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh()).to(DEVICE)
to_colours = nn.Sequential(nn.Conv2d(16, 3, 1), nn.Sigmoid()).to(DEVICE)
history: list[torch.Tensor] = []  # the fault: 64 MiB of activations for each picture, for ever


@torch.inference_mode()
def paint(seed: float) -> np.ndarray[Any, Any]:
    """Return a picture, the same for the same number."""
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(int(seed)))
    features = network(nn.functional.interpolate(noise, size=SIDE, mode="bicubic").to(DEVICE))
    history.append(features)
    pixels = to_colours(features)[0].permute(1, 2, 0) * 255
    return pixels.byte().cpu().numpy()


gradio.Interface(
    paint, gradio.Number(precision=0), gradio.Image(format="png"), api_name="paint"
).launch()
