"""Bodies that are packed: unpacked in pieces, within the limits, or refused by name."""

import gzip
import itertools
import zlib
from collections.abc import Sequence
from unittest import mock

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from aiohttp.test_utils import make_mocked_request
from http_front import FakeFront, serving
from http_raw import BODY, answer, dial, post, refusal
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ServerOptions
from engine.errors import RequestError
from engine.http.intake import MAX_MEMBERS, PIECE_BYTES, Intake, Unpacker
from engine.http.wire import MAX_BODY_BYTES

pytestmark = pytest.mark.anyio
BOMB = gzip.compress(b" " * (MAX_BODY_BYTES + 1))


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop of `engine serve`; other tests of the server run on asyncio's own."""
    return "asyncio", {"use_uvloop": True}


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {"gzip": gzip.compress, "deflate": zlib.compress, "raw": raw_deflate}


def unpack(coding: str, parts: Sequence[bytes]) -> bytes:
    unpacker = Unpacker(coding)
    pieces = [piece for part in parts for piece in unpacker.pieces(part)]
    unpacker.finish()
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


@given(
    data=st.binary(max_size=300).flatmap(lambda some: st.integers(0, 3000).map(lambda times: some * times)),
    kind=st.sampled_from(sorted(PACKERS)),
    cuts=st.lists(st.integers(0, 2000), max_size=5),
)
def test_a_packed_body_is_unpacked_however_it_comes(data: bytes, kind: str, cuts: list[int]) -> None:
    packed = PACKERS[kind](data)
    edges = [0, *sorted(min(cut, len(packed)) for cut in cuts), len(packed)]
    parts = [packed[start:end] for start, end in itertools.pairwise(edges)]
    assert unpack("gzip" if kind == "gzip" else "deflate", parts) == data


def test_the_last_byte_may_unpack_to_more_than_a_piece_has_room_for() -> None:
    for size in range(PIECE_BYTES + 100, PIECE_BYTES + 130):
        packer = zlib.compressobj(wbits=-15, strategy=zlib.Z_FIXED)
        packed = packer.compress(b" " * size) + packer.flush()
        assert unpack("deflate", [packed]) == b" " * size


@given(members=st.lists(st.binary(max_size=50), min_size=1, max_size=20), cut=st.integers(0, 200))
def test_several_members_are_one_body(members: list[bytes], cut: int) -> None:
    packed = b"".join(map(gzip.compress, members))
    assert unpack("gzip", [packed[:cut], packed[cut:]]) == b"".join(members)


@pytest.mark.parametrize(
    ("coding", "packed", "says"),
    [
        ("gzip", b"hello", "is not gzip, as its Content-Encoding says"),
        ("gzip", zlib.compress(BODY), "is not gzip"),
        ("deflate", gzip.compress(BODY), "is not deflate"),
        ("gzip", gzip.compress(BODY)[:-1], "its gzip data end too early"),
        ("gzip", gzip.compress(BODY)[:5], "its gzip data end too early"),
        ("deflate", zlib.compress(BODY)[:-1], "its deflate data end too early"),
        ("gzip", gzip.compress(BODY) + b"more", "is not gzip"),
        ("gzip", gzip.compress(BODY) + b"\0" * 8, "is not gzip"),
        ("gzip", gzip.compress(BODY)[:-8] + b"\0" * 8, "incorrect data check"),
        ("deflate", zlib.compress(BODY) + b"more", "more bytes come after the end of its deflate data"),
        ("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1), "more than 1024 gzip members"),
    ],
    ids=itertools.count(),  # gzip writes the time into what it packs
)
def test_what_is_not_packed_as_it_says(coding: str, packed: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        unpack(coding, [packed])
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


async def test_packed_requests_are_answered() -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        for coding, packed in (
            (b"gzip", gzip.compress(BODY)),
            (b"X-GZIP", gzip.compress(BODY) + gzip.compress(b"  ")),
            (b"deflate", zlib.compress(BODY)),
            (b"deflate", raw_deflate(BODY)),
            (b"identity", BODY),
        ):
            assert (await answer(stream, post(packed, b"Content-Encoding: " + coding)))[0] == 200, coding
        empty = b"POST /flush_cache HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"
        assert (await answer(stream, empty))[0] == 200
        assert await refusal(stream, post(b"", b"Content-Encoding: gzip")) == (400, "invalid_value")
        assert await refusal(stream, post(b"hello", b"Content-Encoding: gzip")) == (400, "invalid_body")


@pytest.mark.parametrize("fields", [[b"br"], [b"gzip, gzip"], [b"gzip", b"gzip"], [b"zstd"]])
async def test_an_unknown_coding_is_named(fields: list[bytes]) -> None:
    async with serving(FakeFront()) as url, dial(url) as stream:
        status, headers, body = await answer(stream, post(BODY, *(b"Content-Encoding: " + one for one in fields)))
    assert (status, body["error"]["code"], headers["Accept-Encoding"]) == (415, "unsupported_encoding", "gzip, deflate")
    assert repr(b", ".join(fields).decode()) in body["error"]["message"]


async def read_packed(intake: Intake, packed: bytes, coding: str = "gzip") -> bytes:
    payload = aiohttp.StreamReader(mock.Mock(), 2**16)
    payload.feed_data(packed)
    payload.feed_eof()
    return await intake.read(make_mocked_request("POST", "/", headers={"Content-Encoding": coding}, payload=payload))


async def test_the_loop_turns_while_bodies_are_unpacked() -> None:
    intake, turns = Intake(ServerOptions()), 0

    async def read(number: int) -> None:
        with pytest.raises(RequestError, match="is over 33554432 bytes"):
            await read_packed(intake, BOMB)
        running.discard(number)

    running = set(range(6))
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(read, number)
        while running:
            await anyio.lowlevel.checkpoint()
            turns += 1
    # Four pieces a turn, of six bodies or, at the end, of fewer.
    assert turns >= 6 * (MAX_BODY_BYTES // PIECE_BYTES) // 4
    await anyio.lowlevel.checkpoint()
    assert intake._total == 0 and not intake._held


async def test_packed_bytes_that_unpack_to_nothing_are_bounded_too() -> None:
    empty_block = b"\x00\x00\x00\xff\xff"
    intake = Intake(ServerOptions(max_body_memory=1000))
    assert await read_packed(intake, empty_block * 199 + b"\x03\x00", "deflate") == b""
    with pytest.raises(RequestError, match="is over 1000 bytes"):
        await read_packed(intake, empty_block * 201, "deflate")
