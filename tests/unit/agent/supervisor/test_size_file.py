"""The file of learned sizes: whole or ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
from vram_agent.supervision.sizes import FileSizes, LearnedSize


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_the_file_says_what_was_written_and_is_replaced_whole(tmp_path: Path) -> None:
    store = FileSizes(tmp_path / "state")
    assert await store.read() == {}
    size = LearnedSize(source="/models/a", vram_bytes=7, host_bytes=5)
    await store.write({"k": size})
    assert await store.read() == {"k": size}
    assert names(tmp_path / "state") == ["sizes.json"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"{", id="cut off"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe\x00", id="not a text"),
        pytest.param(b'{"version": "v2", "sizes": {}}', id="of a later version"),
        pytest.param(b'{"restartID": "x"}', id="of another kind"),
        pytest.param(
            b'{"sizes": {"k": {"source": "a", "vramBytes": -1}}}', id="with an impossible figure"
        ),
        pytest.param(b" " * ((1 << 20) + 1), id="far too long"),
    ],
)
async def test_a_file_that_is_no_use_is_ignored_with_one_line_of_log(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sizes.json").write_bytes(content)
    assert await FileSizes(tmp_path).read() == {}
    assert capsys.readouterr().out.count("learned sizes ignored") == 1


async def test_a_folder_in_the_files_place_is_ignored_and_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sizes.json" / "x").mkdir(parents=True)
    store = FileSizes(tmp_path)
    assert await store.read() == {}
    assert "learned sizes ignored" in capsys.readouterr().out
    with pytest.raises(OSError, match="directory"):
        await store.write({})
    assert names(tmp_path) == ["sizes.json"]
