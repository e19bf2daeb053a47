"""API keys: several, from a file that may change, compared with all, and never shown."""

import hmac
import os
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from http_front import FakeFront, serving

from engine import cli
from engine.config import Config, ServerOptions, resolve
from engine.errors import ConfigError
from engine.http.keys import MOST_KEYS, Keys, own_key, read_keys

pytestmark = pytest.mark.anyio


async def status_of(session: aiohttp.ClientSession, key: str) -> int:
    async with session.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
        return response.status


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("\ufeff# for the team\nalice-1\r\n\n  bob-2  \n#carol-3\n", encoding="utf-8")
    return path


async def test_each_of_several_keys_is_taken(file: Path) -> None:
    async with (
        serving(FakeFront(), api_key=("one", "zwölf"), api_key_file=str(file)) as url,
        aiohttp.ClientSession(url) as session,
    ):
        for key in ("one", "zwölf", "alice-1", "bob-2"):
            assert await status_of(session, key) == 200
        for key in ("", "one,zwölf", "on", "one1", "carol-3", "#carol-3", "# for the team", "bob"):
            assert await status_of(session, key) == 401
        for name in ("x-api-key", "X-API-Key"):
            async with session.get("/v1/models", headers={name: "bob-2"}) as response:
                assert response.status == 200


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(ServerOptions(api_key=("first", "second", "third")))
    compared: list[tuple[int, int]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((len(ours), len(theirs)))
        return ours == theirs

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given, right in (("first", True), ("third", True), ("no", False), ("x" * 5000, False)):
        assert keys.have([given]) is right
        assert compared == [(32, 32)] * 3
        compared.clear()


def test_a_file_that_changes_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "engine.http.keys")
    monkeypatch.setattr("engine.http.keys.RELOAD_SECONDS", 0.0)
    keys = Keys(ServerOptions(api_key=("one",), api_key_file=str(file)))
    file.write_text("dave-4\n")
    assert keys.have(["dave-4"]) and keys.have(["one"]) and not keys.have(["alice-1"])
    for broken in (b"", b"# none\n", b"\xff\xfe", b"dave 4\n"):  # half written, say: the keys before it stay
        caplog.clear()
        file.write_bytes(broken)
        assert keys.have(["dave-4"]) and not keys.have(["dave"])
        assert len(caplog.messages) == 1 and "stay valid" in caplog.messages[0]
        assert "dave" not in caplog.text
    file.unlink()
    assert keys.have(["dave-4"]) and keys.have(["dave-4"])
    assert sum("No such file" in message for message in caplog.messages) == 1
    file.write_text("erin-5\n")
    os.utime(file, (1, 1))
    assert keys.have(["erin-5"]) and not keys.have(["dave-4"])
    assert "read 1 API keys" in caplog.text and "erin" not in caplog.text


def test_a_pipe_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.http.keys.RELOAD_SECONDS", 0.0)
    reader, writer = os.pipe()
    os.write(writer, b"piped\n")
    os.close(writer)
    keys = Keys(ServerOptions(api_key_file=f"/dev/fd/{reader}"))
    assert keys.have(["piped"]) and keys.have(["piped"])
    os.close(reader)
    assert keys.have(["piped"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no keys"),
        (b"\n# only\n", "has no keys"),
        (b"good\nsecret with words\n", "line 2 of .* has a space"),
        (b"\xff\xfes\x00e\x00c\x00", "not UTF-8"),
        (b"secret\n" * (MOST_KEYS + 1), f"over {MOST_KEYS} keys"),
        (b"secret" * 200_000, "bytes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_of_no_keys_stops_the_start(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        Keys(ServerOptions(api_key_file=str(path)))
    assert str(path) in str(caught.value) and "secret" not in str(caught.value)


def test_the_start_refuses_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, says in (
        (["--api-key-file", str(tmp_path / "none")], "--api-key-file"),
        (["--cors-origins", "localhost"], "--cors-origins names 'localhost'"),
        (["--allowed-hosts", "http://gpu"], "--allowed-hosts names 'http://gpu'"),
        (["--api-key", ""], "--api-key is"),
        (["--api-key", ", ,"], "--api-key is"),  # a variable that is not set must not open the server
    ):
        assert cli.main(["serve", "--model", "echo", *flags]) == 2
        said = capsys.readouterr().err
        assert re.match(r"(.* starting echo\n)?engine: error: [^\n]*\n$", said) and says in said


def test_lists_are_split_and_files_are_read_for_clients(file: Path) -> None:
    config = resolve({"api_key": "a, b"}, {"ENGINE_API_KEY_FILE": str(file)})
    assert config.server.api_key == ("a", "b")
    assert read_keys(str(file)) == ["alice-1", "bob-2"]
    assert own_key(config.server) == "a"
    assert own_key(ServerOptions(api_key_file=str(file))) == "alice-1"
    assert own_key(ServerOptions()) is None


async def test_no_answer_and_no_line_shows_a_key(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    front = FakeFront()
    server: dict[str, Any] = {"api_key": ("one-1", "two-2"), "api_key_file": str(file)}
    front.config = Config(server=ServerOptions(**server))
    said = ""
    async with serving(front, **server) as url, aiohttp.ClientSession(url) as session:
        for key in ("one-1", "wrong"):
            for path in ("/server_info", "/model_info", "/openapi.json", "/metrics", "/nowhere", "/v1/models"):
                async with session.get(path, headers={"x-api-key": key}) as response:
                    said += await response.text() + str(response.headers)
    assert str(file) in said  # where they are is no secret
    for key in ("one-1", "two-2", "alice-1", "bob-2"):
        assert key not in said + caplog.text
