"""Small torch modules whose answers can be worked out by hand, saved in every form that exists.

Called by tests of the runtime Torch; ``Affine`` is also a factory, loaded by templates. Its weights
lie in a parameter, a buffer and a plain attribute, where each form of file keeps them elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

X = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
Y = [[120.0, 226.0], [156.0, 280.0]]
"""X times [[0 1], [2 3], [4 5]] is [[10 13], [28 40]]; twice that, and 100 and 200 more."""
SUMS = [346.0, 436.0]


class Affine(nn.Module):
    """y = 2 (x @ weight) + shift, and the sums of its rows. Zeros, until it is filled."""

    def __init__(self, rows: int = 3, columns: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.register_buffer("factor", torch.zeros(1))
        self.shift = torch.tensor([100.0 * (1 + column) for column in range(columns)])

    def filled(self) -> Affine:
        """With weights that count modulo 7, row after row."""
        values = torch.arange(self.weight.numel(), dtype=torch.float32).remainder_(7)
        self.weight.data.copy_(values.reshape(self.weight.shape))
        self.factor.fill_(2)  # type: ignore[operator]
        return self.eval()

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = x @ self.weight * self.factor + self.shift  # type: ignore[operator]
        if more is not None:
            y = y + more
        return {"y": y, "sums": y.sum(dim=1)}


class Plain(nn.Module):
    """The same with a tuple, no optional input, and a tensor made while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Affine().filled()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.inner(x)["y"]
        return y, y @ torch.ones(2, device=x.device)


class Tied(nn.Module):
    """One weight under two names, and a running count that a task writes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(3, 3, bias=False)
        self.up = nn.Linear(3, 3, bias=False)
        self.up.weight = self.down.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.add_(1)  # type: ignore[operator]
        return self.up(self.down(x)), self.calls.clone()  # type: ignore[operator]


# Without types in torch.
_script: Any = torch.jit.script
_trace: Any = torch.jit.trace


@contextmanager
def making_torchscript() -> Iterator[None]:
    """TorchScript is deprecated, and its files are what users have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        yield


def save_scripted(path: Path, rows: int = 3, columns: int = 2) -> None:
    with making_torchscript():
        _script(Affine(rows, columns).filled()).save(str(path))


def save_frozen(path: Path, rows: int = 3, columns: int = 2) -> None:
    """Every weight is a constant of the graph."""
    with making_torchscript():
        torch.jit.freeze(_script(Affine(rows, columns).filled())).save(str(path))


def save_traced(path: Path) -> None:
    """The plain attribute is a constant of the graph; the rest are parameters and buffers."""
    with making_torchscript():
        _trace(Plain().eval(), torch.tensor(X)).save(str(path))


def save_exported(path: Path) -> None:
    """Any number of rows."""
    sizes = {"x": {0: torch.export.Dim("n")}}
    program = torch.export.export(Plain().eval(), (torch.tensor(X),), dynamic_shapes=sizes)
    torch.export.save(program, path)


def save_exported_affine(path: Path, rows: int, columns: int) -> None:
    """One row at a time."""
    program = torch.export.export(Affine(rows, columns).filled(), (torch.zeros(1, rows),))
    torch.export.save(program, path)


def save_weights(path: Path, rows: int = 3, columns: int = 2) -> None:
    """The weights of an Affine, as safetensors or by torch.save; the attribute is in neither."""
    state = Affine(rows, columns).filled().state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
