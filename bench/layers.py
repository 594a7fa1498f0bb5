"""The model that is measured: layers of 16 MiB with values that anyone can check.

Imported by the benchmarks, by templates (`load`, as the factory of the runtime Python) and by the
plain process that stands for a server without an agent (`main`). Torch is imported where it is
needed only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

WIDTH = 2048
LAYER_BYTES = WIDTH * WIDTH * 4
VALUES = 7


def make_layers(size_bytes: int) -> list[dict[str, Any]]:
    """Return layers of ``size_bytes`` in all; the weight of layer i is i modulo 7 everywhere."""
    import torch  # noqa: PLC0415 - takes seconds

    return [
        {
            "weight": torch.full((WIDTH, WIDTH), float(index % VALUES)),
            "bias": torch.full((WIDTH,), 1.0),
        }
        for index in range(max(1, size_bytes // LAYER_BYTES))
    ]


def check_layers(layers: list[dict[str, Any]]) -> None:
    """Raise unless every layer holds what it was made of, at both ends."""
    for index, layer in enumerate(layers):
        ends = layer["weight"][0, 0].item(), layer["weight"][-1, -1].item()
        if ends != (index % VALUES, index % VALUES):
            raise ValueError(f"layer {index} holds {ends}")


def expect_outputs(layer_count: int) -> list[float]:
    """Return what ones give: a sum over the layer's rows, and the bias."""
    return [float(WIDTH * (index % VALUES) + 1) for index in range(layer_count)]


class Layers:
    """Each layer's answer to the same input; reads every weight once."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        self.layers = layers

    def infer(self, inputs: Mapping[str, Any], _parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first element of each layer's output."""
        import torch  # noqa: PLC0415 - takes seconds

        x = torch.from_numpy(inputs["x"]).to(self.layers[0]["weight"].device)
        outputs = [(x @ one["weight"] + one["bias"])[0, 0] for one in self.layers]
        return {"y": torch.stack(outputs).cpu().numpy()}


def load(path: str) -> Layers:
    """Load a checkpoint in host memory, for the runtime Python."""
    import torch  # noqa: PLC0415 - takes seconds

    return Layers(torch.load(path, mmap=True, weights_only=True))


def make_nothing() -> object:
    """Return a model without weights: it keeps a template alive while others come and go."""
    return Layers([])


def measure(path: str, size_bytes: int) -> dict[str, Any]:
    """Write a checkpoint, in a process of its own: the caller stays small."""
    import torch  # noqa: PLC0415 - takes seconds

    torch.save(make_layers(size_bytes), path)
    return {}


def main() -> None:
    """Be a server without an agent: import, load onto the device, answer once."""
    import numpy as np  # noqa: PLC0415 - part of what is measured
    import torch  # noqa: PLC0415 - part of what is measured

    path, device = sys.argv[1:]
    layers = Layers(torch.load(path, map_location=device, weights_only=True))
    answer = layers.infer({"x": np.ones((1, WIDTH), np.float32)}, {})
    print(answer["y"].tolist(), flush=True)


if __name__ == "__main__":
    main()
