"""Where media come from: what is fetched, what is not, and how much of it."""

import base64
import binascii
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_web import PICTURE, odd_web

from engine.errors import ConfigError, RequestError
from engine.media import sources as module
from engine.media.addresses import Hosts, check_sources
from engine.media.sources import Sources
from engine.options.media import MediaOptions

pytestmark = pytest.mark.anyio


def data_url(data: bytes = PICTURE, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


async def read(source: str, kind: Any = "image", **options: Any) -> bytes:
    with anyio.fail_after(60):
        return (await Sources(MediaOptions(**options)).read(source, kind)).data


async def refused(source: str, kind: Any = "image", **options: Any) -> tuple[str, str]:
    """Code and message of the error."""
    with pytest.raises(RequestError) as error:
        await read(source, kind, **options)
    assert error.value.status == 400
    return error.value.code, error.value.message


LOOPBACK = ("127.0.0.1",)

# ── data: ────────────────────────────────────────────────────────────────────────────────────


async def test_data_urls_hold_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = data_url()
    lines = plain[:40] + "\r\n" + plain[40:] + "\n"
    quoted = plain.replace("+", "%2B").replace("/", "%2F").replace("image%2Fpng", "image/png")
    for source in (
        plain,
        lines,
        quoted,
        data_url(kind=""),
        data_url(kind="image/jpeg"),
        data_url(kind="IMAGE/PNG;a=b"),
    ):
        assert await read(source) == PICTURE
    assert await read(data_url(kind="video/mp4"), "video") == PICTURE
    monkeypatch.setattr(module, "LARGE", 10)
    assert await read(plain) == PICTURE


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("data:", "a data: URL has the form data:image/...;base64,..."),
        ("data:image/png;base64", "a data: URL has the form"),
        ("data:image/png,abc", "a data: URL has the form"),
        ("data:image/png;base64,", "is empty; send its bytes"),
        ("data:image/png;base64,????", "is not base64 after its comma"),
        ("data:image/png;base64,abc", "is not base64 after its comma (Incorrect padding); encode it anew"),
        (
            "data:text/html;base64,PGh0bWwvPg==",
            "is of the type 'text/html', and an image is needed; send image/...",
        ),
        ("data:video/mp4;base64,AAAA", "is of the type 'video/mp4', and an image is needed"),
        ("data:image/png;base64,é", "is not base64"),
        ("data:image/png;base64,%zz\ud800", "is not base64"),
    ],
)
async def test_malformed_data_urls_are_refused(source: str, says: str) -> None:
    code, message = await refused(source)
    assert code == "invalid_media" and says in message


@pytest.mark.parametrize(
    ("text", "threads"), [("QUJD" * 12_000, 0), ("%51UJD" * 8_000, 1), ("QUJ%44" + "QUJD" * 9_000, 1)]
)
async def test_what_takes_long_to_decode_is_not_decoded_in_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, text: str, threads: int
) -> None:
    """2 MiB of percent signs held everybody up for 0.3 s."""
    used, run = [], anyio.to_thread.run_sync

    async def counted(*given: Any) -> Any:
        used.append(given)
        return await run(*given)

    monkeypatch.setattr(module.anyio.to_thread, "run_sync", counted)
    assert set(await read(f"data:image/png;base64,{text}")) == set(b"ABC")
    assert len(used) == threads


@given(st.text("ABab09+/=\n %é", max_size=9) | st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode()))
def test_base64_is_what_binascii_takes_of_it(text: str) -> None:
    try:
        packed = unquote_to_bytes(text.encode("ascii", "replace")).translate(None, b" \n")
        wanted = binascii.a2b_base64(packed, strict_mode=True)
    except binascii.Error:
        with pytest.raises(binascii.Error):
            module.unpacked(text)
    else:
        assert module.unpacked(text) == wanted


def test_plain_base64_takes_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.binascii, "a2b_base64", lambda *_, **__: pytest.fail("it took the slow way"))
    assert module.unpacked(base64.b64encode(PICTURE).decode()) == PICTURE
    assert module.unpacked(base64.encodebytes(PICTURE).decode().replace("+", "%2B")) == PICTURE


async def test_size_is_checked_before_a_data_url_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unpacked", lambda _: pytest.fail("it was decoded"))
    code, message = await refused(data_url(bytes(4000)), media_bytes=1000)
    assert code == "media_too_large" and "bytes, and at most 1000 are taken (--media-bytes); send it smaller" in message


# ── http: ────────────────────────────────────────────────────────────────────────────────────


async def test_an_allowed_host_is_fetched_from_through_redirects() -> None:
    async with odd_web() as web:
        assert await read(f"{web.url}/picture", media_hosts=LOOPBACK) == PICTURE
        assert await read(f"http://localhost:{web.port}/picture", media_hosts=LOOPBACK) == PICTURE
        assert await read(f"{web.url}/to/{web.url}/picture", media_hosts=LOOPBACK) == PICTURE
        assert await read(f"{web.url}/to//picture", media_hosts=("127.0.0.0/8",)) == PICTURE
        fresh = await Sources(MediaOptions(media_hosts=LOOPBACK)).read(f"{web.url}/fresh", "image")
        assert (fresh.data, fresh.fresh) == (PICTURE, 60.0)
        unkept = await Sources(MediaOptions(media_hosts=LOOPBACK)).read(f"{web.url}/unkept", "image")
        assert (unkept.data, unkept.fresh) == (PICTURE, 0.0)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",  # 127.0.0.1 as one number
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "127.0.0.1.",
        "127\u30020\u30020\u30021",  # a full stop of another script
        "\u2460\u2461\u2466.0.0.1",  # digits in circles
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00::1]",
        "[fec0::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "224.0.0.1",
        "255.255.255.255",
    ],
)
async def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    code, message = await refused(f"http://{host}:1/a.png")
    assert code == "media_not_allowed" and "send it as a data: URL" in message


async def test_redirects_are_looked_at_anew() -> None:
    async with odd_web() as web:
        for target, says in (
            ("http://169.254.169.254/latest", "'169.254.169.254', which this server does not fetch from"),
            ("http://[::1]/", "'::1', which this server does not"),
            ("http://10.0.0.1/", "'10.0.0.1', which this server does not"),
            ("file:///etc/passwd", "leads to a 'file' URL, and only http and https are followed"),
            ("data:image/png;base64,AAAA", "leads to a 'data' URL"),
            ("http://user:secret@127.0.0.1/", "a URL with a user or a password in it"),
        ):
            code, message = await refused(f"{web.url}/to/{target}", media_hosts=LOOPBACK)
            assert code == "media_not_allowed" and says in message, target
        code, message = await refused(f"{web.url}/circle", media_hosts=LOOPBACK)
        assert code == "media_unreachable" and "more than 5 redirects" in message and web.asked["/circle"] == 6


async def test_the_address_that_is_checked_is_the_one_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means a public address at first and loopback then: it is looked up once."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if host != "rebinding.test":
            return real(host, port, *rest, **more)
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    connected: list[Any] = []

    async def connect(self: Any, sock: Any, address: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError("not in a test")

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.sock_connect", connect, raising=False)
    monkeypatch.setattr("asyncio.selector_events.BaseSelectorEventLoop.sock_connect", connect)
    code, _ = await refused("http://rebinding.test:1/a.png", media_seconds=5)
    assert code == "media_unreachable" and asked == ["rebinding.test"] and connected == [("93.184.216.34", 1)]


async def test_a_name_with_a_private_address_among_others_is_never_connected_to_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def both(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.1", "10.1.1.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert (await refused("http://mixed.test/a.png"))[0] == "media_not_allowed"


def test_hosts_are_names_and_networks() -> None:
    public, private = "93.184.216.34", "10.1.2.3"
    anyone = Hosts(())
    assert anyone.allows("a.com", public) and not anyone.allows("a.com", private)
    named = Hosts(("A.com", "*.b.org", "10.1.0.0/16"))
    assert named.allows("a.com", public) and named.allows("A.COM.", public) and named.allows("x.y.b.org", public)
    assert not named.allows("b.org", public) and not named.allows("evila.com", public)
    assert not named.allows("a.com", "192.168.0.1"), "a name does not make its address public"
    assert named.allows("what.ever", private) and not named.allows("what.ever", "10.2.0.1")
    assert named.allows("a.com", "::ffff:10.1.2.3") and not named.allows("a.com", "::ffff:10.2.0.1")
    wide = Hosts(("*", "10.1.0.0/16"))
    assert wide.allows("a.com", public) and wide.allows("a.com", private) and not wide.allows("a.com", "10.2.0.1")
    assert not Hosts(("none",)).allows("a.com", public)
    for wrong in (("http://a.com",), ("a.*",), ("a.com:80",), ("none", "a.com"), ("10.0.0.0/99",)):
        with pytest.raises(ConfigError, match="--media-hosts"):
            Hosts(wrong)


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("status/404", "media_unreachable", "it answers 404"),
        ("status/500", "media_unreachable", "it answers 500"),
        ("status/304", "media_unreachable", "it answers 304"),
        ("long", "media_too_large", "has 1099511627776 bytes, and at most 100000 are taken"),
        ("endless", "media_too_large", "bytes, and at most 100000 are taken (--media-bytes)"),
        ("short", "media_unreachable", "ClientPayloadError"),
        ("empty", "invalid_media", "is empty"),
        ("page", "invalid_media", "is of the type 'text/html', and an image is needed"),
        ("packed", "invalid_media", "comes packed (gzip), unasked"),
        ("noise", "media_unreachable", "cannot be fetched from 'http://127.0.0.1:"),
        ("stall", "media_timeout", "took over 0.5 s to come from 'http://127.0.0.1:"),
        ("less", "media_unreachable", "(ClientResponseError); check the URL"),
    ],
)
async def test_servers_that_do_not_do_as_they_should(path: str, code: str, says: str) -> None:
    async with odd_web() as web:
        found, message = await refused(
            f"{web.url}/{path}", media_hosts=LOOPBACK, media_bytes=100_000, media_seconds=0.5 if path == "stall" else 20
        )
        assert found == code and says in message
        assert web.sent < 10_000_000


@pytest.mark.parametrize("name", ["Location", "Content-Type"])
async def test_a_header_with_several_values_is_refused_and_the_same_one_twice_is_no_question(name: str) -> None:
    async with odd_web() as web:
        code, message = await refused(f"{web.url}/twice/{name}", media_hosts=LOOPBACK)
        assert code == "media_unreachable"
        assert f"(it answers with 2 values of {name}, where one is allowed); check the URL" in message
        assert await read(f"{web.url}/twice/{name}/same", media_hosts=LOOPBACK) == PICTURE
        assert not web.asked["/fresh"]


async def test_what_many_fetch_together_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HELD", 50)
    async with odd_web() as web:
        with pytest.raises(RequestError, match="try again in a moment") as full:
            await read(f"{web.url}/picture", media_hosts=LOOPBACK)
        assert (full.value.status, full.value.code) == (503, "queue_full")


@pytest.mark.parametrize(
    "source",
    [
        "ftp://a.com/b.png",
        "a.png",
        "/etc/passwd",
        "",
        "javascript:alert(1)",
        "blob:http://a",
        "http://",
        "http://user@a.com/",
        "http:///etc/passwd",
        "https://a.com/" + "x" * 9000,
        "http://:-1 [::1]user@",  # of which the parser trips
        "http://[",
        "http://a.com:99999/",
        "http://a.com/\ud800",
        "file:\ud800",
        "http://a.com/\r\nX: y",
    ],
)
async def test_other_urls_are_refused(source: str) -> None:
    code, message = await refused(source)
    assert code == "media_not_allowed" and "send it as a data: URL" in message and len(message) < 300


async def test_none_is_nowhere() -> None:
    for host in ("127.0.0.1", "93.184.216.34", "a.example"):
        assert (await refused(f"http://{host}/", media_hosts=("none",)))[0] == "media_not_allowed"


# ── file: ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "root" / "in ner").mkdir(parents=True)
    (tmp_path / "root" / "in ner" / "a.png").write_bytes(PICTURE)
    (tmp_path / "root" / "empty").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "folder").symlink_to(tmp_path)
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "a").write_bytes(b"secret")
    os.mkfifo(tmp_path / "root" / "pipe")
    return tmp_path


async def test_files_below_the_root_are_read(tree: Path) -> None:
    root = str(tree / "root")
    for source in (
        f"file://{root}/in%20ner/a.png",
        f"file:{root}/in ner/a.png",
        f"file://localhost{root}/in ner/a.png",
    ):
        assert await read(source, media_root=root) == PICTURE
    alias = tree / "alias"
    alias.symlink_to(root)
    for spelled in (root, alias):  # as it is, and as the option says
        assert await read(f"file://{spelled}/in%20ner/a.png", media_root=str(alias)) == PICTURE
        assert (await refused(f"file://{spelled}/link", media_root=str(alias)))[0] == "media_unreachable"
    assert (await refused(f"file://{alias}/../secret", media_root=str(alias)))[0] == "media_not_allowed"
    assert await read(f"file://{root}/in%20ner/a.png", media_root="/") == PICTURE


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("root/../secret", "media_not_allowed", "not below --media-root"),
        ("root/in%20ner/../../secret", "media_not_allowed", "not below"),
        ("root/%2e%2e/secret", "media_not_allowed", "not below"),
        ("root%2f..%2fsecret", "media_not_allowed", "not below"),
        ("secret", "media_not_allowed", "not below"),
        ("rooted/a", "media_not_allowed", "not below"),
        ("root", "media_not_allowed", "not below"),
        ("root/link", "media_unreachable", "or a link on the way"),
        ("root/folder/secret", "media_unreachable", "or a link on the way"),
        ("root/missing", "media_unreachable", "No such file"),
        ("root/in%20ner", "media_not_allowed", "no regular file"),
        ("root/pipe", "media_not_allowed", "no regular file"),
        ("root/empty", "invalid_media", "is empty"),
        ("root/a%00b", "media_not_allowed", "not below"),
    ],
)
async def test_nothing_else_is(tree: Path, path: str, code: str, says: str) -> None:
    found, message = await refused(f"file://{tree}/{path}", media_root=str(tree / "root"))
    assert found == code and says in message
    assert (await refused(f"file://{tree}/{path}"))[1].startswith("is a file: URL, and this server reads no files")


def test_a_root_that_is_no_directory_stops_the_start(tree: Path) -> None:
    for root in (tree / "secret", tree / "missing"):
        with pytest.raises(ConfigError, match=r"--media-root is .*, which is no directory"):
            check_sources(MediaOptions(media_root=str(root)))


async def test_a_file_has_a_size_and_a_host(tree: Path) -> None:
    root, path = str(tree / "root"), f"{tree}/root/in ner/a.png"
    assert (await refused(f"file://{path}", media_root=root, media_bytes=10))[0] == "media_too_large"
    code, message = await refused(f"file://evil.com{path}", media_root=root)
    assert code == "media_not_allowed" and "on the host 'evil.com'" in message
