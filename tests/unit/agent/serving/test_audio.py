from __future__ import annotations

import asyncio
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pytest
from vram_agent.errors import BadInputError, TooLargeError
from vram_agent.serving.audio import AudioDecoder
from vram_agent.serving.scratch import open_scratch

from tests.unit.agent.serving.sounds import crossings, encoded, floats, tone, wav


def no_ffmpeg() -> None:
    return None


@pytest.fixture
def upload() -> Iterator[BinaryIO]:
    with open_scratch() as file:
        yield file


def fill(file: BinaryIO, data: bytes) -> BinaryIO:
    file.write(data)
    file.flush()
    return file


def running_children() -> set[str]:
    return {
        task.read_text()
        for task in Path("/proc/self/task").glob("*/children")
        if task.read_text().strip()
    }


async def test_short_pcm16_is_read_without_ffmpeg_and_scaled_to_one(upload: BinaryIO) -> None:
    data = wav(array("h", [0, 16_384, -32_768, 32_767]))
    tensor = await AudioDecoder(find=no_ffmpeg).decode(fill(upload, data))
    assert (tensor.name, tensor.datatype, tensor.shape) == ("audio", "FP32", (4,))
    assert floats(tensor).tolist() == [0.0, 0.5, -1.0, 32_767 / 32_768]


async def test_stereo_pcm16_is_averaged_without_ffmpeg(upload: BinaryIO) -> None:
    data = wav(array("h", [16_384, 0, -16_384, -16_384]), channels=2)
    tensor = await AudioDecoder(find=no_ffmpeg).decode(fill(upload, data))
    assert floats(tensor).tolist() == [0.25, -0.5]


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
async def test_other_rates_keep_pitch_and_length_without_ffmpeg(
    upload: BinaryIO, rate_hz: int
) -> None:
    data = wav(tone(1.0, rate_hz), rate_hz)
    samples = floats(await AudioDecoder(find=no_ffmpeg).decode(fill(upload, data)))
    assert len(samples) == 16_000
    assert abs(crossings(samples) - 440) <= 1
    assert max(samples) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        pytest.param("mp3", (), id="mp3"),
        pytest.param("flac", (), id="flac"),
        pytest.param("ogg", ("-c:a", "libopus"), id="ogg opus"),
        pytest.param("webm", ("-c:a", "libopus"), id="webm of a browser's recorder"),
        pytest.param("m4a", (), id="m4a whose index is at the end"),
        pytest.param("wav", ("-c:a", "pcm_s24le"), id="wav of 24 bits"),
    ],
)
async def test_what_ffmpeg_reads_becomes_16_khz_mono(
    upload: BinaryIO, tmp_path: Path, suffix: str, options: tuple[str, ...]
) -> None:
    fill(upload, encoded(tmp_path, suffix, *options))
    samples = floats(await AudioDecoder().decode(upload))
    assert len(samples) == pytest.approx(16_000, rel=0.1)
    assert crossings(samples) == pytest.approx(440, rel=0.05)
    assert max(samples) == pytest.approx(0.5, abs=0.1)


async def test_no_audio_is_refused_without_this_machine_s_paths(upload: BinaryIO) -> None:
    with pytest.raises(BadInputError, match="no audio could be read") as caught:
        await AudioDecoder().decode(fill(upload, b"this is a text" * 100))
    assert caught.value.param == "file"
    for word in ("/proc", "/dev", "/tmp", "0x"):
        assert word not in caught.value.message


async def test_an_empty_upload_is_refused(upload: BinaryIO) -> None:
    with pytest.raises(BadInputError):
        await AudioDecoder().decode(upload)


async def test_a_wav_without_samples_is_refused(upload: BinaryIO) -> None:
    with pytest.raises(BadInputError, match="holds no sound"):
        await AudioDecoder().decode(fill(upload, wav(array("h"))))


async def test_a_video_without_sound_is_refused(upload: BinaryIO, tmp_path: Path) -> None:
    data = encoded(
        tmp_path, "mkv", "-f", "lavfi", "-i", "color=s=16x16:d=0.1", "-map", "1:v", "-c:v", "ffv1"
    )
    with pytest.raises(BadInputError, match="no audio could be read"):
        await AudioDecoder().decode(fill(upload, data))


@pytest.mark.parametrize(
    "playlist",
    [
        pytest.param("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n", id="hls"),
        pytest.param("ffconcat version 1.0\nfile {path}\n", id="concat"),
    ],
)
async def test_a_playlist_cannot_make_ffmpeg_open_another_file(
    upload: BinaryIO, tmp_path: Path, playlist: str
) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(tone(0.5)))
    with pytest.raises(BadInputError, match="no audio could be read"):
        await AudioDecoder().decode(fill(upload, playlist.format(path=secret).encode()))


async def test_other_formats_without_ffmpeg_name_the_remedy(upload: BinaryIO) -> None:
    with pytest.raises(BadInputError, match="install ffmpeg"):
        await AudioDecoder(find=no_ffmpeg).decode(fill(upload, b"ID3 something"))


async def test_a_wav_that_is_too_long_is_refused_before_it_is_read(upload: BinaryIO) -> None:
    decoder = AudioDecoder(find=no_ffmpeg, max_audio_seconds=0.5)
    with pytest.raises(TooLargeError, match=r"longer than 0\.5 seconds"):
        await decoder.decode(fill(upload, wav(tone(0.6))))


async def test_what_decodes_to_too_much_is_refused(upload: BinaryIO, tmp_path: Path) -> None:
    fill(upload, encoded(tmp_path, "flac", "-af", "aloop=loop=-1:size=44100", "-t", "9"))
    with pytest.raises(TooLargeError, match="longer than 3 seconds"):
        await AudioDecoder(max_audio_seconds=3).decode(upload)


def script(folder: Path, body: str) -> str:
    """A stand-in for ffmpeg."""
    path = folder / "ffmpeg"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return str(path)


async def test_a_decoder_that_hangs_is_ended(upload: BinaryIO, tmp_path: Path) -> None:
    before = running_children()
    path = script(tmp_path, "import signal; signal.pause()")
    decoder = AudioDecoder(find=lambda: path, timeout_seconds=0.2)
    with pytest.raises(BadInputError, match=r"longer than 0\.2 seconds"):
        await decoder.decode(fill(upload, b"x"))
    assert running_children() == before


async def test_a_cancelled_decode_ends_ffmpeg(upload: BinaryIO, tmp_path: Path) -> None:
    before = running_children()
    fifo = tmp_path / "started"
    path = script(tmp_path, f"open({str(fifo)!r}, 'w').close()\nimport signal; signal.pause()")
    os.mkfifo(fifo)
    decoding = asyncio.create_task(AudioDecoder(find=lambda: path).decode(fill(upload, b"x")))
    await asyncio.to_thread(fifo.read_text)  # returns once the process has opened it
    decoding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await decoding
    assert running_children() == before


async def test_complaints_without_end_are_not_kept(upload: BinaryIO, tmp_path: Path) -> None:
    body = (
        "import sys\n"
        "for _ in range(2000): sys.stderr.write('x' * 1000 + '\\n')\n"
        "sys.stderr.write('[mp3 @ 0x55d0c0ffee] Error: file:/proc/self/fd/0: bad \\adata')\n"
        "sys.exit(1)\n"
    )
    path = script(tmp_path, body)
    with pytest.raises(BadInputError) as caught:
        await AudioDecoder(find=lambda: path).decode(fill(upload, b"x"))
    assert caught.value.message == ("no audio could be read: Error: the upload: bad  data")


async def test_a_length_beyond_the_file_means_to_its_end(upload: BinaryIO) -> None:
    data = bytearray(wav(array("h", [1, 2, 3])))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    tensor = await AudioDecoder(find=no_ffmpeg).decode(fill(upload, bytes(data)))
    assert tensor.shape == (3,)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"RIFF", id="cut in the header"),
        pytest.param(b"RIFF\0\0\0\0WAVE", id="no chunk"),
        pytest.param(b"RIFF\0\0\0\0WAVEdata\4\0\0\0abcd", id="samples before their format"),
        pytest.param(b"RIFF\0\0\0\0WAVEfmt \2\0\0\0\1\0data\0\0\0\0", id="a short format"),
        pytest.param(b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 100, id="chunks without end"),
    ],
)
async def test_broken_wav_files_are_refused(upload: BinaryIO, data: bytes) -> None:
    with pytest.raises(BadInputError):
        await AudioDecoder(find=no_ffmpeg).decode(fill(upload, data))


async def test_scratch_files_have_no_name_and_fall_back_to_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_only(**_: object) -> BytesIO:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with open_scratch() as file:
        assert floats(await AudioDecoder(find=no_ffmpeg).decode(fill(file, wav(tone(0.1)))))


async def test_loud_stereo_stays_within_the_range_as_in_whisper_s_own_loader(
    upload: BinaryIO, tmp_path: Path
) -> None:
    data = encoded(tmp_path, "flac", "-af", "volume=6dB")
    samples = floats(await AudioDecoder().decode(fill(upload, data)))
    reference = encoded(
        tmp_path, "raw", "-af", "volume=6dB", "-ac", "1", "-ar", "16000", "-f", "s16le"
    )
    expected = array("h", reference)
    assert max(map(abs, samples)) <= 1.0
    assert [round(value * 32_768) for value in samples] == pytest.approx(expected.tolist(), abs=200)
