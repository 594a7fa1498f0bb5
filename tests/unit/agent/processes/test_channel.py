"""Messages and descriptors between processes: whole, in order, and none left open."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.backend import Tensor
from vram_agent.processes.channel import (
    MAX_INLINE_BYTES,
    AsyncChannel,
    BrokenPacketError,
    Channel,
    ChannelClosedError,
    Packet,
    close_fds,
    map_sealed,
    open_socket_pair,
    seal_bytes,
)
from vram_agent.processes.messages import (
    MAX_INLINE_TENSOR_BYTES,
    pack_tensors,
    unpack_tensors,
)


def count_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _leaks_no_descriptor() -> Iterator[None]:
    # Mappings of earlier tests, which have a descriptor each, must not end within this one.
    gc.collect()
    before = count_fds()
    yield
    assert count_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = open_socket_pair()
    one, other = Channel(ours), Channel(theirs)
    yield one, other
    one.close()
    other.close()


class Loop:
    """An AsyncChannel with what it received."""

    def __init__(self, sock: socket.socket) -> None:
        self.packets: asyncio.Queue[Packet] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.channel = AsyncChannel(sock, self.packets.put_nowait, self.ended.set)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(0, id="empty"),
        pytest.param(1, id="one byte"),
        pytest.param(MAX_INLINE_BYTES, id="the longest that travels inline"),
        pytest.param(MAX_INLINE_BYTES + 1, id="the shortest that travels in a memfd"),
        pytest.param(5_000_000, id="far too long for a datagram"),
    ],
)
def test_a_message_arrives_whole(pair: tuple[Channel, Channel], size: int) -> None:
    one, other = pair
    body = os.urandom(size)
    one.send(body)
    one.send(b"next")
    assert other.receive() == Packet(body)
    assert other.receive() == Packet(b"next")


@pytest.mark.parametrize("body", [b"small", b"x" * (MAX_INLINE_BYTES + 1)])
def test_descriptors_travel_in_order_and_are_closed_here(
    pair: tuple[Channel, Channel], body: bytes
) -> None:
    one, other = pair
    sent = [seal_bytes([b"first"]), seal_bytes([b"second"])]
    before = count_fds()
    one.send(body, sent)
    assert count_fds() == before - 2
    packet = other.receive()
    assert packet.body == body
    assert [bytes(map_sealed(fd)) for fd in packet.fds] == [b"first", b"second"]
    assert not any(os.get_inheritable(fd) for fd in packet.fds)
    close_fds(packet.fds)


def test_the_end_of_the_peer_is_an_error_once_its_messages_are_read(
    pair: tuple[Channel, Channel],
) -> None:
    one, other = pair
    one.send(b"last")
    one.close()
    assert other.receive().body == b"last"
    with pytest.raises(ChannelClosedError):
        other.receive()
    with pytest.raises(ChannelClosedError):
        other.send(b"too late", [seal_bytes([b"x"])])


def test_a_memfd_that_could_still_shrink_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.write(fd, b"data")
    with pytest.raises(BrokenPacketError, match="seals"):
        map_sealed(fd)
    os.close(fd)


def test_a_mapped_view_may_be_written_without_touching_the_file() -> None:
    fd = seal_bytes([b"data"])
    view = map_sealed(fd)
    view[0:1] = b"D"
    assert bytes(view) == b"Data"
    assert bytes(map_sealed(fd)) == b"data"
    os.close(fd)
    del view


async def test_the_loop_receives_all_and_then_the_end() -> None:
    ours, theirs = open_socket_pair()
    loop, peer = Loop(ours), Channel(theirs)
    peer.send(b"one", [seal_bytes([b"x"])])
    peer.send(b"y" * (MAX_INLINE_BYTES + 1))
    peer.close()
    await loop.ended.wait()
    first, second = loop.packets.get_nowait(), loop.packets.get_nowait()
    assert (first.body, len(first.fds), len(second.body)) == (b"one", 1, MAX_INLINE_BYTES + 1)
    close_fds(first.fds)
    assert not loop.channel.is_open
    with pytest.raises(ChannelClosedError):
        loop.channel.send(b"late", [seal_bytes([b"x"])])


async def test_what_does_not_fit_the_peers_buffer_waits_and_keeps_its_order() -> None:
    ours, theirs = open_socket_pair()
    loop, peer = Loop(ours), Channel(theirs)
    count = 200
    for number in range(count):
        loop.channel.send(bytes([number]) * 40_000, [seal_bytes([bytes([number])])])

    def receive_all() -> list[tuple[int, int]]:
        found = []
        for _ in range(count):
            packet = peer.receive()
            found.append((packet.body[0], bytes(map_sealed(packet.fds[0]))[0]))
            close_fds(packet.fds)
        return found

    assert await asyncio.to_thread(receive_all) == [(number, number) for number in range(count)]
    loop.channel.close()
    peer.close()


async def test_what_waits_is_closed_with_the_channel() -> None:
    ours, theirs = open_socket_pair()
    loop = Loop(ours)
    for _ in range(200):
        loop.channel.send(b"x" * 40_000, [seal_bytes([b"x"])])
    loop.channel.close()
    loop.channel.close()
    theirs.close()
    assert not loop.ended.is_set()


async def test_a_packet_that_is_not_ours_ends_the_channel() -> None:
    ours, theirs = open_socket_pair()
    loop = Loop(ours)
    theirs.send(b"\x01")
    await loop.ended.wait()
    theirs.close()


@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3), st.binary()),
        max_size=5,
    )
)
def test_small_tensors_come_back_as_they_were_without_a_descriptor(
    parts: list[tuple[str, list[int], bytes]],
) -> None:
    tensors = [
        Tensor(name=name, datatype="UINT8", shape=tuple(shape), data=data)
        for name, shape, data in parts
    ]
    headers, fds = pack_tensors(tensors)
    assert fds == []
    back = unpack_tensors(headers, fds)
    assert [(t.name, t.shape, bytes(t.data)) for t in back] == [
        (name, tuple(shape), data) for name, shape, data in parts
    ]


@pytest.mark.parametrize(
    ("sizes", "fd_count"),
    [
        pytest.param((MAX_INLINE_TENSOR_BYTES,), 0, id="the largest that travels in its header"),
        pytest.param((MAX_INLINE_TENSOR_BYTES + 1,), 1, id="the smallest that travels in a memfd"),
        pytest.param((7, 0, 100_000, 1), 1, id="small ones beside a large one"),
    ],
)
def test_tensors_come_back_as_they_were_and_can_be_written_to(
    sizes: tuple[int, ...], fd_count: int
) -> None:
    sent = [os.urandom(size) for size in sizes]
    tensors = [
        Tensor(name=str(number), datatype="UINT8", shape=(len(data),), data=data)
        for number, data in enumerate(sent)
    ]
    headers, fds = pack_tensors(tensors)
    assert len(fds) == fd_count
    assert all(header.offset % 64 == 0 for header in headers)
    back = unpack_tensors(headers, fds)
    assert [bytes(tensor.data) for tensor in back] == sent
    for tensor in back:
        view = memoryview(tensor.data)
        assert not view.readonly
        view[:] = bytes(view.nbytes)
    assert [bytes(tensor.data) for tensor in back] == [bytes(size) for size in sizes]
