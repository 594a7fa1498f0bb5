from __future__ import annotations

import asyncio
import gzip
import io
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, cast

import aiohttp
import pytest
from vram_agent.serving import uploads
from vram_agent.serving.scratch import ScratchFullError, close_scratch, write_scratch

from tests.unit.agent.serving.conftest import Agent, StartAgent

TRANSCRIPTIONS = "/v1/audio/transcriptions"
MEBIBYTE = 1024**2
HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
)
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def open_files() -> list[str]:
    return [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]


def scratch_files() -> int:
    return sum("vram-agent" in name or "/tmp/#" in name for name in open_files())


class Zeros:
    """A recording of so many zeros, sent chunk by chunk; notes the peak of memory on the way."""

    def __init__(self, mebibytes: int) -> None:
        self.mebibytes = mebibytes
        self.sent = 0
        self.peak_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunk = bytes(MEBIBYTE)
        yield HEAD
        for _ in range(self.mebibytes):
            yield chunk
            self.sent += 1
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
        yield b"\r\n--b--\r\n"


async def test_a_large_upload_is_cut_off_and_memory_stays_flat(start_agent: StartAgent) -> None:
    agent = await start_agent(request_bytes="32Mi")
    zeros = Zeros(300)
    before = resident_bytes()
    async with agent.session.post(
        agent.serving(TRANSCRIPTIONS), data=zeros.__aiter__(), headers=FORM
    ) as answer:
        assert answer.status == 413
        assert (await answer.json())["error"]["code"] == "request_too_large"
    assert zeros.peak_bytes - before < 48 * MEBIBYTE
    assert not agent.server.submissions


async def test_a_large_upload_that_is_admitted_lies_on_disk(start_agent: StartAgent) -> None:
    agent = await start_agent(request_bytes="1Gi")
    zeros = Zeros(300)
    before = resident_bytes()
    async with agent.session.post(
        agent.serving(TRANSCRIPTIONS), data=zeros.__aiter__(), headers=FORM
    ) as answer:
        assert answer.status == 400  # received to its end: zeros are no audio
        assert "no audio could be read" in await answer.text()
    assert zeros.sent == 300
    assert zeros.peak_bytes - before < 48 * MEBIBYTE


async def raw_request(agent: Agent, head: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = agent.running.serving_address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.replace("\n", "\r\n").encode())
    return reader, writer


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, "/v2/models/adder/infer"])
async def test_an_announced_size_is_refused_before_a_byte_is_read(
    start_agent: StartAgent, path: str
) -> None:
    agent = await start_agent(request_bytes="1Mi")
    reader, writer = await raw_request(
        agent,
        f"POST {path} HTTP/1.1\nHost: a\nContent-Type: multipart/form-data; boundary=b\n"
        "Content-Length: 1048577\n\n",
    )
    assert (await reader.readline()).split()[1] == b"413"
    writer.close()


async def test_a_client_that_asks_first_is_told_no(start_agent: StartAgent) -> None:
    agent = await start_agent(request_bytes="1Mi")
    reader, writer = await raw_request(
        agent,
        f"POST {TRANSCRIPTIONS} HTTP/1.1\nHost: a\nExpect: 100-continue\n"
        "Content-Length: 1048577\n\n",
    )
    assert (await reader.readline()).split()[1] == b"413"
    writer.close()


async def test_a_client_that_asks_first_is_told_to_go_on(agent: Agent) -> None:
    reader, writer = await raw_request(
        agent,
        f"POST {TRANSCRIPTIONS} HTTP/1.1\nHost: a\nExpect: 100-continue\n"
        "Content-Type: text/plain\nContent-Length: 2\n\n",
    )
    assert (await reader.readline()).split()[1] == b"100"
    writer.write(b"ab")
    assert await reader.readline() == b"\r\n"
    assert (await reader.readline()).split()[1] == b"400"
    writer.close()


async def test_a_chunked_json_body_is_cut_off_too(start_agent: StartAgent) -> None:
    agent = await start_agent(request_bytes="1Mi")

    async def spaces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * MEBIBYTE

    async with agent.session.post(agent.serving("/v2/models/adder/infer"), data=spaces()) as answer:
        assert answer.status == 413
        assert await answer.json() == {"error": "the request is larger than 1Mi bytes"}


async def test_a_compressed_body_counts_by_what_it_unpacks_to(start_agent: StartAgent) -> None:
    agent = await start_agent(request_bytes="1Mi")
    bomb = gzip.compress(b" " * (200 * MEBIBYTE), compresslevel=1)
    assert len(bomb) < MEBIBYTE
    before = resident_bytes()
    async with agent.session.post(
        agent.serving("/v2/models/adder/infer"), data=bomb, headers={"Content-Encoding": "gzip"}
    ) as answer:
        assert answer.status == 413
    assert resident_bytes() - before < 48 * MEBIBYTE


async def test_a_client_that_goes_away_while_it_sends_leaves_no_file_behind(agent: Agent) -> None:
    before = scratch_files()
    part_sent = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield HEAD + bytes(2 * MEBIBYTE)
        part_sent.set()
        await asyncio.Event().wait()

    sending = asyncio.create_task(
        agent.session.post(agent.serving(TRANSCRIPTIONS), data=half(), headers=FORM)
    )
    await part_sent.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await agent.running.close()  # waits for the handlers
    assert scratch_files() == before
    assert not agent.server.submissions


async def test_a_form_beyond_its_parts_counts_as_a_whole(start_agent: StartAgent) -> None:
    agent = await start_agent(request_bytes="1000")
    data = aiohttp.FormData(default_to_multipart=True)
    data.add_field("prompt", "x" * 600)
    data.add_field("language", "y" * 600)
    async with agent.session.post(agent.serving(TRANSCRIPTIONS), data=data) as answer:
        assert answer.status == 413


async def test_an_upload_that_finds_no_space_is_told_so_and_the_next_one_is_served(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_full() -> BinaryIO:
        return Path("/dev/full").open("r+b", buffering=0)

    form = HEAD + b"RIFF" + bytes(2 * MEBIBYTE) + b"\r\n--b--\r\n"
    url = agent.serving(TRANSCRIPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr(uploads, "open_scratch", open_full)
        async with agent.session.post(url, data=io.BytesIO(form), headers=FORM) as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "5"
            error = (await answer.json())["error"]
    assert error["code"] == "scratch_full"
    assert f"no space left in {tempfile.gettempdir()}" in error["message"]
    async with agent.session.post(url, data=io.BytesIO(form), headers=FORM) as answer:
        assert answer.status == 400  # received whole: zeros are no audio


def test_what_could_not_be_written_does_not_hinder_closing() -> None:
    file = cast("BinaryIO", Path("/dev/full").open("r+b"))  # noqa: SIM115 - closing is the test
    with pytest.raises(ScratchFullError):
        write_scratch(file, b"x")
    close_scratch(file)
    assert file.closed


async def test_a_flood_is_refused_before_its_bodies_are_read(start_agent: StartAgent) -> None:
    agent = await start_agent(max_depth=2)
    url = agent.serving(TRANSCRIPTIONS)
    end = asyncio.Event()
    open_ = [asyncio.Event() for _ in range(3)]

    async def unfinished(begun: asyncio.Event) -> AsyncIterator[bytes]:
        yield HEAD + bytes(MEBIBYTE)
        begun.set()
        await end.wait()
        yield b"\r\n--b--\r\n"

    async def send(begun: asyncio.Event) -> int:
        async with agent.session.post(url, data=unfinished(begun), headers=FORM) as answer:
            return answer.status

    sending = [asyncio.create_task(send(begun)) for begun in open_]
    await asyncio.gather(*(begun.wait() for begun in open_))
    for path in (TRANSCRIPTIONS, "/v1/audio/translations", "/v2/models/adder/infer"):
        async with agent.session.post(agent.serving(path), data=b"", headers=FORM) as answer:
            assert answer.status == 429
            assert answer.headers["Retry-After"] == "1"
            assert answer.headers["Connection"] == "close"
            assert "3 requests are open" in await answer.text()
    end.set()
    assert await asyncio.gather(*sending) == [400] * 3  # zeros are no audio
    async with agent.session.post(url, data=b"", headers=FORM) as answer:
        assert answer.status == 400


async def test_a_body_that_was_refused_unread_is_not_kept_with_the_connection(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent()
    before = resident_bytes()
    body = bytes(48 * 1024)
    kept = []
    for _ in range(600):
        session = aiohttp.ClientSession()
        kept.append(session)
        url = agent.serving("/v2/models/nowhere/infer")
        async with session.post(url, data=body) as answer:
            assert answer.status == 404
    grown = resident_bytes() - before
    await asyncio.gather(*(session.close() for session in kept))
    assert grown < 600 * len(body) * 2 // 3
