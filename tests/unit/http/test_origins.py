"""Who may call: tables of Hosts, Origins and what browsers add, and the same over HTTP on every route."""

import re
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import pytest
from http_front import FakeFront, serving
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from engine.config import ServerOptions
from engine.errors import ConfigError, RequestError
from engine.http.app import ROUTES
from engine.http.origins import MOST_TOLD, Access, Origin, binds_loopback, read_authority, read_origin
from engine.messages.questions import CountExperts, Profile, Question

pytestmark = pytest.mark.anyio
LOOPBACK = Access.of(ServerOptions())
PUBLIC = Access.of(ServerOptions(host="0.0.0.0"))
FRIEND = "http://localhost:5173"
FRIENDLY = Access.of(ServerOptions(cors_origins=(FRIEND, "https://Chat.Example/", "chrome-extension://abcd")))
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def check(access: Access, *, target: str = "/v1/models", page: bool = False, **headers: str | list[str]) -> str | None:
    """The code of the refusal, or None."""
    sent = CIMultiDict[str]()
    for name, values in headers.items():
        for value in [values] if isinstance(values, str) else values:
            sent.add(name.replace("_", "-"), value)
    try:
        access.check(sent, target=target, page=page)
    except RequestError as error:
        assert error.status == 403
        return error.code
    return None


# ── Host ─────────────────────────────────────────────────────────────────────────────────────

OURS = [
    "localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "localhost.:8000", "app.localhost", "a.b.localhost:80",
    "127.0.0.1", "127.0.0.1:8000", "127.9.9.9", "127.0.0.1.", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:8000",
    "[0:0:0:0:0:0:0:1]", "192.168.1.5:8000", "[fe80::1%25eth0]:80", "0.0.0.0:8000", "",
]  # fmt: skip
FOREIGN = [
    "elsewhere.example", "elsewhere.example:8000", "localhost.elsewhere.example", "elsewhere.example.", "notlocalhost",
    "127.0.0.1.elsewhere.example", "127.0.0.1:8000@elsewhere.example", "localhost@elsewhere.example", "1.2.3", "[::1",
    "localhost:port", "localhost/../x", "localhost elsewhere", "0x7f.1", "2130706433", "::1", "a:b:c", ".", "..",
    "[localhost]", "localhost,elsewhere.example", "ｌocalhost", "localhost:123456",
]  # fmt: skip


@pytest.mark.parametrize("host", OURS)
def test_names_of_this_machine_and_addresses_are_taken(host: str) -> None:
    assert check(LOOPBACK, Host=host) is None
    assert check(Access.of(ServerOptions(host="0.0.0.0", allowed_hosts=("gpu.example",))), Host=host) is None


@pytest.mark.parametrize("host", FOREIGN)
def test_another_name_on_a_loopback_bind_is_refused(host: str) -> None:
    assert check(LOOPBACK, Host=host) == "host_not_allowed"
    assert check(LOOPBACK, Host=["localhost", host]) == "host_not_allowed"
    assert check(PUBLIC, Host=host) is None


@given(st.text(string.printable + "é。"), st.text())
def test_no_text_in_a_header_is_an_error_of_ours(host: str, origin: str) -> None:
    for access in (LOOPBACK, PUBLIC, FRIENDLY):
        assert check(access, Host=host, Origin=origin) in (None, "host_not_allowed", "origin_not_allowed")


@given(
    st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,3}", fullmatch=True), st.sampled_from(["", ":80", ".", ".:1"])
)
def test_a_name_is_taken_only_if_it_leads_here(name: str, rest: str) -> None:
    address = re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", name)
    if not address and name != "localhost" and not name.endswith(".localhost"):
        assert check(LOOPBACK, Host=name + rest) == "host_not_allowed"
        named = Access.of(ServerOptions(allowed_hosts=(name.upper(),)))
        assert check(named, Host=name + rest) is None
        assert check(named, Host=f"x{name}{rest}") == "host_not_allowed"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("::1", True), ("localhost", True), ("LocalHost", True), ("127.1.2.3", True),
        ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("", False), ("192.168.0.1", False),
        ("no-such-name.invalid", False),
    ],
)  # fmt: skip
def test_which_binds_are_loopback(host: str, loopback: bool) -> None:
    assert binds_loopback(host) is loopback
    assert (Access.of(ServerOptions(host=host)).hosts is not None) is loopback


def test_names_that_are_given_are_taken_and_no_others() -> None:
    access = Access.of(ServerOptions(host="0.0.0.0", allowed_hosts=("GPU.example.", "*.lab.example")))
    for host in ("gpu.example", "gpu.example:8000", "a.lab.example", "a.b.lab.example.", "localhost", "10.0.0.7:1"):
        assert check(access, Host=host) is None
    for host in ("lab.example", "xlab.example", "a.gpu.example", "elsewhere.example", "example"):
        assert check(access, Host=host) == "host_not_allowed"
    assert check(Access.of(ServerOptions(allowed_hosts=("*",))), Host="elsewhere.example") is None


def test_the_host_of_an_absolute_target_counts_as_well() -> None:
    ours, other = "http://localhost:8000/v1/models", "http://elsewhere.example/v1/models"
    assert check(LOOPBACK, target=ours, Host="localhost") is None
    assert check(LOOPBACK, target=other, Host="localhost") == "host_not_allowed"
    assert check(LOOPBACK, target=ours, Host="elsewhere.example") == "host_not_allowed"
    assert check(LOOPBACK, target="HTTP://elsewhere.example?x") == "host_not_allowed"
    assert check(LOOPBACK, target="*", Host="localhost") is None


# ── Origin and Sec-Fetch-Site ────────────────────────────────────────────────────────────────

HERE = {"Host": "localhost:8000"}
NAVIGATION = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, and every client that is no browser
        {"Host": "localhost:8000"},
        {**HERE, "Sec_Fetch_Site": "none"},  # typed into the address bar
        {**HERE, "Sec_Fetch_Site": "same-origin"},
        {**HERE, "Origin": "http://localhost:8000", "Sec_Fetch_Site": "same-origin"},
        {**HERE, "Origin": "http://localhost:8000"},  # plain HTTP to another machine carries no Sec-Fetch-Site
        {**HERE, "Origin": "null", "Sec_Fetch_Site": "same-origin"},  # a form of ours that sends no referrer
        {"Host": "gpu.localhost", "Origin": "http://GPU.localhost:80"},
        {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
        # Behind a proxy that speaks TLS, or names us as it knows us, the browser's own word is what is left.
        {"Host": "127.0.0.1:8000", "Origin": "https://gpu.example", "Sec_Fetch_Site": "same-origin"},
    ],
)
def test_programs_and_our_own_pages_are_served(headers: dict[str, str]) -> None:
    for access in (LOOPBACK, PUBLIC, FRIENDLY):
        assert check(access, **headers) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "https://elsewhere.example", "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
        {"Origin": "https://elsewhere.example", "Sec_Fetch_Site": "none"},  # an extension's own request
        {"Origin": "http://localhost:3000", "Sec_Fetch_Site": "same-site"},  # another program on this machine
        {"Origin": "http://localhost"},
        {"Origin": "https://localhost:8000"},
        {"Origin": "http://localhost:8000", "Sec_Fetch_Site": "cross-site"},
        {"Origin": "http://localhost:80000"},
        {"Origin": "http://localhost:8000.elsewhere.example"},
        {"Origin": "http://localhost:8000@elsewhere.example"},
        {"Origin": ["http://localhost:8000", "https://elsewhere.example"]},
        {"Origin": "http://localhost:8000, https://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": "null", "Sec_Fetch_Site": "cross-site"},
        {"Origin": "file://"},
        {"Sec_Fetch_Site": "cross-site"},  # an image, a script, a form by GET
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "what"},
        {"Sec_Fetch_Site": ["same-origin", "cross-site"]},
        {**NAVIGATION, "Origin": "https://elsewhere.example"},  # a form by POST
    ],
)
@pytest.mark.parametrize("page", [False, True])
def test_another_page_is_refused(headers: dict[str, Any], page: bool) -> None:
    for access in (LOOPBACK, PUBLIC, FRIENDLY):
        assert check(access, page=page, **HERE, **headers) == "origin_not_allowed"
    assert check(Access.of(ServerOptions(cors_origins=("*",))), page=page, **HERE, **headers) is None


def test_a_link_opens_a_page_and_nothing_else() -> None:
    assert check(LOOPBACK, page=True, **HERE, **NAVIGATION) is None
    assert check(LOOPBACK, page=False, **HERE, **NAVIGATION) == "origin_not_allowed"
    for name, value in (("Sec_Fetch_Dest", "iframe"), ("Sec_Fetch_Mode", "no-cors"), ("Sec_Fetch_Dest", "")):
        assert check(LOOPBACK, page=True, **HERE, **{**NAVIGATION, name: value}) == "origin_not_allowed"


def test_origins_that_are_given_are_served_in_any_spelling() -> None:
    for origin in (FRIEND, "HTTP://LOCALHOST:5173", "https://chat.example", "https://chat.example:443",
                   "chrome-extension://abcd"):  # fmt: skip
        assert check(FRIENDLY, **HERE, Origin=origin, Sec_Fetch_Site="cross-site") is None
        assert FRIENDLY.shares_with(origin)
    for origin in ("http://localhost:5174", "https://localhost:5173", "http://chat.example", "https://a.chat.example",
                   "https://chat.example:80", "chrome-extension://abcde", "null"):  # fmt: skip
        assert check(FRIENDLY, **HERE, Origin=origin, Sec_Fetch_Site="cross-site") == "origin_not_allowed"
        assert not FRIENDLY.shares_with(origin)


names = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,20}[a-zA-Z0-9])?", fullmatch=True)
origins = st.builds(
    lambda scheme, host, port: f"{scheme}://{host}" + (f":{port}" if port else ""),
    st.sampled_from(["http", "https", "tauri"]),
    names,
    st.integers(0, 65535),
)


@given(
    listed=st.lists(origins, min_size=1, max_size=4), asking=origins, site=st.sampled_from(["", "cross-site", "none"])
)
def test_an_origin_is_served_exactly_if_it_is_listed(listed: list[str], asking: str, site: str) -> None:
    access = Access.of(ServerOptions(cors_origins=tuple(listed)))
    allowed = read_origin(asking) in {read_origin(one) for one in listed}
    told = check(access, Host="127.0.0.1:1", Origin=asking, Sec_Fetch_Site=site)
    assert (told is None) is (allowed or (not site and read_origin(asking) == Origin("http", "127.0.0.1", 1)))
    assert all(check(access, Host="127.0.0.1:1", Origin=one, Sec_Fetch_Site=site) is None for one in listed)


@given(names, st.integers(1, 65535))
def test_authorities_are_read_whole(host: str, port: int) -> None:
    assert read_authority(f"{host}:{port}") == (host.lower(), port)
    assert read_origin(f"http://{host}:{port}") == ("http", host.lower(), port)


# ── options ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cors_origins": ("localhost:5173",)}, "'localhost:5173', which is no origin; write scheme://host"),
        ({"cors_origins": ("http://a/path",)}, "'http://a/path', which is no origin"),
        ({"cors_origins": ("http://*.example",)}, "which is no origin"),
        ({"cors_origins": ("null",)}, "null, which is the origin of files"),
        ({"cors_origins": ("*", FRIEND)}, "either * or a list"),
        ({"allowed_hosts": ("http://gpu",)}, "'http://gpu', which is no host"),
        ({"allowed_hosts": ("gpu:8000",)}, "without a port"),
        ({"allowed_hosts": ("bücher.example",)}, "xn--"),
        ({"allowed_hosts": ("*.",)}, "which is no host"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Access.of(ServerOptions(**options))


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────


class Watched(FakeFront):
    """Notes every call that does something."""

    def __init__(self) -> None:
        super().__init__()
        self.did: list[str] = []

    async def flush(self) -> Any:
        self.did.append("flush")
        return await super().flush()

    async def end_session(self, owner: bytes, cache_salt: str, id: str) -> bool:
        self.did.append("end")
        return await super().end_session(owner, cache_salt, id)

    def abort(self, rid: str | None) -> int:
        self.did.append("abort")
        return super().abort(rid)

    async def pause(self, wanted: bool, *, retract: bool = False) -> None:
        self.did.append("pause")

    async def ask(self, question: Question[Any]) -> Any:
        match question:
            case Profile():
                self.did.append("profile")
                raise RequestError("not here")
            case CountExperts(action) if action != "look":
                self.did.append("count")
        raise RequestError("no experts here")


@asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[tuple[Watched, aiohttp.ClientSession]]:
    front = Watched()
    async with serving(front, **options) as url, aiohttp.ClientSession(url) as session:
        yield front, session


def concrete(path: str) -> str:
    return re.sub(r"\{\w+(:[^}]*)?\}", "x", path)


EVERY = [(route.method, concrete(route.path)) for route in ROUTES]
CROSS = {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
IMAGE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}


@pytest.mark.parametrize("headers", [CROSS, IMAGE, {"Host": "elsewhere.example"}, {"Origin": "null"}])
async def test_every_route_is_guarded(headers: dict[str, str]) -> None:
    async with asking() as (front, session):
        for method, path in [*EVERY, ("GET", "/nowhere"), ("PUT", "/v1/models"), ("HEAD", "/health")]:
            async with session.request(method, path, data=b"{}", headers=headers) as response:
                assert response.status == 403, (method, path)
                if method == "HEAD":
                    continue
                answer = await response.json()
            assert answer["error"]["code"] in ("origin_not_allowed", "host_not_allowed")
            assert "--cors-origins" in str(answer) or "--allowed-hosts" in str(answer)
            if "Sec-Fetch-Dest" not in headers:
                assert "elsewhere.example" in str(answer) or "null" in str(answer)
            if path.startswith("/v1/messages"):
                assert (answer["type"], answer["error"]["type"]) == ("error", "permission_error")
        assert (front.asked, front.did) == ([], [])


async def test_nothing_that_acts_answers_to_get_or_head() -> None:
    reading = {"/health_generate"}  # a probe that makes a token; it keeps nothing
    async with asking() as (front, session):
        for path in sorted({path for _, path in EVERY}):
            for method in ("GET", "HEAD"):
                async with session.request(method, path) as response:
                    assert response.status != 500
            if path not in reading:
                assert (front.asked, front.did) == ([], []), path
            front.asked.clear()
        for path in ("/flush_cache", "/abort_request", "/pause_generation", "/expert_distribution/start"):
            async with session.get(path) as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
        async with session.post("/flush_cache") as response:
            assert (response.status, front.did) == (200, ["flush"])


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.1\r\nHost:\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.1\r\nHost: LocalHost.:1\r\n\r\n", 200),
        (b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://elsewhere.example/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
        (b"GET http://elsewhere.example/v1/models HTTP/1.0\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere.example\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nHost: \xff\r\n\r\n", 403),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 403),
    ],
)
async def test_requests_as_they_are_on_the_wire(lines: bytes, status: int) -> None:
    async with serving(FakeFront()) as url, await anyio.connect_tcp("127.0.0.1", urlsplit(url).port) as stream:  # type: ignore[arg-type]
        with anyio.fail_after(60):
            await stream.send(lines)
            assert (await stream.receive()).split()[1] == b"%d" % status


ASKED = {
    "Origin": FRIEND,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


async def test_a_preflight_is_answered_on_every_route_without_a_key() -> None:
    async with asking(cors_origins=(FRIEND,), api_key=("sesame",)) as (_, session):
        for path in sorted({path for _, path in EVERY} | {"/nowhere"}):
            async with session.options(path, headers=ASKED) as response:
                assert (response.status, await response.read()) == (204, b"")
                told = response.headers
            assert (told["Access-Control-Allow-Origin"], told["Vary"]) == (FRIEND, "Origin")
            assert told["Access-Control-Allow-Headers"] == ASKED["Access-Control-Request-Headers"]
            assert told["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
            assert (told["Access-Control-Allow-Credentials"], told["Access-Control-Max-Age"]) == ("true", "7200")
            assert "Access-Control-Allow-Private-Network" not in told
        private = {**ASKED, "Access-Control-Request-Private-Network": "true"}
        async with session.options("/v1/models", headers=private) as response:
            assert response.headers["Access-Control-Allow-Private-Network"] == "true"
        async with session.options("/v1/models", headers={**ASKED, "Origin": "http://localhost:1"}) as response:
            assert response.status == 403
            assert not [name for name in response.headers if name.startswith("Access-Control-")]


async def test_an_allowed_origin_reads_answers_errors_and_streams() -> None:
    async with asking(cors_origins=(FRIEND,)) as (front, session):
        headers = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
        for body, status in ((CHAT, 200), ({**CHAT, "stream": True}, 200), ({}, 400)):
            async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
                await response.read()
                assert response.status == status
            assert (response.headers["Access-Control-Allow-Origin"], response.headers["Vary"]) == (FRIEND, "Origin")
            exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
            assert "X-Request-Id" in exposed and "Vary" not in exposed
        assert len(front.asked) == 2
        front.script = [RequestError("full", code="queue_full", status=503)]
        async with session.post("/v1/messages", json=CHAT, headers=headers) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers["Access-Control-Expose-Headers"].split(", ")
        async with session.get("/nowhere", headers=headers) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (404, FRIEND)
        async with session.get("/v1/models") as response:  # a cache may keep one answer for all
            assert (response.headers["Vary"], response.status) == ("Origin", 200)
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_any_origin_goes_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    async with asking(cors_origins=("*",)) as (_, session):
        async with session.post("/v1/chat/completions", json=CHAT, headers={"Origin": "null"}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, "*")
            assert "Access-Control-Allow-Credentials" not in response.headers and "Vary" not in response.headers
        async with session.options("/v1/messages", headers={**ASKED, "Origin": "https://a.example"}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "*")
            assert "authorization" in response.headers["Access-Control-Allow-Headers"]
        async with session.get("/v1/models", headers={"Host": "elsewhere.example"}) as response:
            assert response.status == 403
    assert "without an API key" in caplog.text
    caplog.clear()
    async with asking(cors_origins=("*",), api_key=("sesame",)):
        assert caplog.text == ""


async def test_a_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with asking() as (_, session):
        for number in range(2 * MOST_TOLD):
            for _ in range(2):
                async with session.get("/v1/models", headers={"Origin": f"http://a{number}.example"}):
                    pass
    assert len(caplog.messages) == len(set(caplog.messages)) == MOST_TOLD
    assert "add http://a0.example to --cors-origins" in caplog.messages[0]


async def test_without_the_option_no_answer_is_shared() -> None:
    async with asking() as (_, session), session.get("/v1/models") as response:
        assert not [name for name in response.headers if name.startswith("Access-Control-") or name == "Vary"]
