"""Mapped checkpoints give the bits that the library's own loader gives."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper
from vram_agent.engine.arena import Arena
from vram_agent.errors import ModelFailedError
from vram_agent.protocol import ModelSpec, Runtime
from vram_agent.runtimes.checkpoints import Undrawn, can_map, fill
from vram_agent.runtimes.whisper import WhisperRuntime

from tests.models.shapes import WhisperShape, make_whisper_shape

# whisper leaves the file of its tokenizer open for the garbage collector to close:
# https://github.com/openai/whisper/blob/v20250625/whisper/tokenizer.py#L335
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*multilingual.tiktoken:pytest.PytestUnraisableExceptionWarning"
)
HEADS = whisper._ALIGNMENT_HEADS["tiny"]


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("t")
    yield made
    made.close()


def save_stored(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)


def save_deflated(checkpoint: dict[str, Any], path: Path) -> None:
    raw = io.BytesIO()
    torch.save(checkpoint, raw)
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED, 1)


def save_old(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)


def bits_of(model: Any) -> dict[str, tuple[torch.dtype, torch.Size, bool, bytes]]:
    """Every tensor of a Whisper, with those that its state dict leaves out."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors["alignment_heads"] = tensors["alignment_heads"].to_dense()
    return {
        name: (one.dtype, one.shape, one.requires_grad, one.detach().numpy().tobytes())
        for name, one in tensors.items()
    }


@pytest.mark.parametrize(
    ("save", "is_mapped"),
    [
        pytest.param(save_stored, True, id="as torch saves"),
        pytest.param(save_deflated, False, id="compressed"),
        pytest.param(save_old, False, id="as torch saved before 1.6"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "single"])
def test_a_whisper_has_the_bits_that_the_library_gives_it(
    arena: Arena,
    tmp_path: Path,
    dtype: torch.dtype,
    save: Callable[[dict[str, Any], Path], None],
    is_mapped: bool,
) -> None:
    made = tmp_path / "made.pt"
    make_whisper_shape(made, WhisperShape(64, 2, dtype))
    path = tmp_path / "model.pt"
    save(torch.load(made, weights_only=True), path)
    assert can_map(path) == is_mapped
    stock = bits_of(whisper.load_model(str(path), device="cpu"))
    spec = ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(path))
    loaded = WhisperRuntime().load(spec, arena)
    assert bits_of(loaded._model) == stock
    # Two layers with one head each, and the heads of the latter: by the library's default.
    assert loaded._model.alignment_heads.to_dense().tolist() == [[False], [True]]
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_whisper_by_name_has_the_alignment_heads_of_its_name(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.pt"
    make_whisper_shape(path, WhisperShape())
    # The library takes a file for downloaded when it has the checksum in its address.
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(whisper._MODELS, "tiny", f"http://127.0.0.1:9/{checksum}/tiny.pt")
    options = {"downloadRoot": str(tmp_path)}
    spec = ModelSpec(name="m", runtime=Runtime.WHISPER, source="tiny", options=options)
    stock = bits_of(whisper.load_model("tiny", device="cpu", download_root=str(tmp_path)))
    loaded = WhisperRuntime().load(spec, arena)._model
    assert bits_of(loaded) == stock
    default = whisper.Whisper(loaded.dims).alignment_heads.to_dense()
    assert not torch.equal(loaded.alignment_heads.to_dense(), default)


def test_a_whisper_by_name_is_looked_for_where_the_library_would_put_it(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(whisper._MODELS, "tiny", "http://127.0.0.1:9/none/tiny.pt")
    spec = ModelSpec(name="m", runtime=Runtime.WHISPER, source="tiny")
    with pytest.raises(ModelFailedError, match="cannot be read or downloaded"):
        WhisperRuntime().load(spec, arena)
    assert (tmp_path / "whisper").is_dir()


class Net(torch.nn.Module):
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.table = torch.nn.Embedding(4, 2)
        self.register_buffer("scale", torch.full((2,), 0.5), persistent=False)


def test_nothing_is_drawn_and_buffers_are_made_as_ever() -> None:
    state = torch.random.get_rng_state()
    with Undrawn():
        net = Net()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.scale.tolist() == [0.5, 0.5]
    Net()
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_tensors_of_the_modules_dtype_become_its_own_and_others_are_converted() -> None:
    state = {
        "linear.weight": torch.ones(2, 3),
        "linear.bias": torch.tensor([1.5, 2.5], dtype=torch.float16),
        "table.weight": torch.zeros(4, 2, dtype=torch.float64),
    }
    net = Net()
    fill(net, state)
    assert net.linear.weight.data_ptr() == state["linear.weight"].data_ptr()
    assert net.linear.bias.tolist() == [1.5, 2.5]
    assert {one.dtype for one in net.state_dict().values()} == {torch.float32}
    assert all(one.requires_grad for one in net.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"linear.bias": torch.ones(3)}, "size mismatch", id="another shape"),
        pytest.param({"other": torch.ones(1)}, "Unexpected key", id="a name too many"),
    ],
)
def test_a_state_dict_that_does_not_fit_says_why(
    change: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        fill(Net(), {**Net().state_dict(), **change})
