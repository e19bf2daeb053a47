"""HTTP routes and commands that a plugin registers: served and described, run, and refused where they collide."""

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import aiohttp
import anyio
import pytest
from http_front import FakeFront

from engine.cli import main
from engine.config import ServerOptions
from engine.errors import PluginError
from engine.http.app import ROUTES, serve
from engine.http.openapi import describe
from engine.http.plugins import with_plugins
from engine.plugin.registry import Plugins

Write = Callable[[str, str], str]

ROUTE = """
from engine.plugin import RequestError, hookimpl
from engine.plugin.http import Body, Reply, front_of, json_response

API = 1

@hookimpl
def register_routes(register):
    register("POST /shout", "{name}:shout", takes="{name}:{body}", gives="{name}:Shouted")
    register("GET /whoami", "{name}:whoami", open=True)

class {body}(Body):
    text: str

class Shouted(Reply, frozen=True):
    text: str

async def shout(request, body):
    \"\"\"Say it louder.\"\"\"
    if not body.text:
        raise RequestError("text is empty; send some", param="text")
    return json_response(Shouted(body.text.upper()))

async def whoami(request):
    \"\"\"Tell the model.\"\"\"
    return json_response({{"model": front_of(request).model_name}})
"""
COMMAND = """
from engine.plugin import ConfigError, hookimpl

API = 1

@hookimpl
def register_commands(register):
    register("{command}", "{name}:Greet", description="Greet somebody")

class Greet:
    def add_arguments(self, parser):
        parser.add_argument("--name", default="you")

    def run(self, arguments):
        if arguments.name == "nobody":
            raise ConfigError("--name nobody is no name")
        print("hello", arguments.name)
        return 3
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write("name", source)` is the path of a plugin in one file."""

    def written(name: str, source: str) -> str:
        monkeypatch.delitem(sys.modules, name, raising=False)
        path = tmp_path / f"{name}.py"
        path.write_text(dedent(source))
        return str(path)

    return written


def routes_of(*paths: str) -> tuple[object, ...]:
    return with_plugins(ROUTES, Plugins.load(paths))


@pytest.mark.anyio
async def test_a_route_is_served_described_and_checked_like_ours(write: Write) -> None:
    routes = with_plugins(ROUTES, Plugins.load([write("loud", ROUTE.format(name="loud", body="Shout"))]))
    front, listening, urls = FakeFront(), anyio.Event(), []

    def started(url: str) -> None:
        urls.append(url)
        listening.set()

    async def run() -> None:
        await serve(front, ServerOptions(port=0, api_key="k"), routes, started=started)  # type: ignore[arg-type]

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        with anyio.fail_after(60):
            await listening.wait()
        async with aiohttp.ClientSession(urls[0]) as session:
            keyed = {"Authorization": "Bearer k"}
            async with session.post("/shout", json={"text": "hey"}, headers=keyed) as response:
                assert (response.status, await response.json()) == (200, {"text": "HEY"})
            for body, param in (({"text": ""}, "text"), ({"txt": "hey"}, "txt")):
                async with session.post("/shout", json=body, headers=keyed) as response:
                    assert (response.status, (await response.json())["error"]["param"]) == (400, param)
            async with session.post("/shout", json={"text": "hey"}) as response:
                assert response.status == 401
            async with session.get("/whoami") as response:  # an open one
                assert await response.json() == {"model": "fake"}
        group.cancel_scope.cancel()
    paths = describe(routes, models=["fake"], keyed=True)["paths"]
    assert paths["/shout"]["post"]["summary"] == "Say it louder."
    assert "Shout" in str(paths["/shout"]["post"]["requestBody"]) and "Shouted" in str(paths["/shout"]["post"])


def test_no_plugin_adds_no_route() -> None:
    assert routes_of() == ROUTES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("POST /shout", "GET /health"), ["'GET /health'", "wrong.py", "engine.http.admin.admin:health"]),
        (("POST /shout", "GET /v1/responses/{id}"), ["GET /v1/responses/{id}", "responses:retrieve"]),
        (("POST /shout", "SHOUT /shout"), ["'SHOUT /shout'", "GET, POST, DELETE", "'GET /hello'"]),
        (("POST /shout", "/shout"), ["a method of GET"]),
        (("(Body)", ""), ["wrong:Shout is no subclass of engine.plugin.http.Body"]),
        (
            ("wrong:shout", "wrong:shot"),
            ["'POST /shout'", "wrong.py", "wrong:shot cannot be imported", "leave the plugin"],
        ),
        (('takes="wrong:Shout"', 'takes="wrong:Shot"'), ["'POST /shout'", "wrong.py", "wrong:Shot cannot be imported"]),
        (("wrong:shout", "wrong:API"), ["'POST /shout'", "wrong.py", "wrong:API is no function but a int"]),
    ],
)
def test_a_route_that_cannot_be_is_refused(write: Write, changes: tuple[str, str], words: list[str]) -> None:
    path = write("wrong", ROUTE.format(name="wrong", body="Shout").replace(*changes, 1))
    with pytest.raises(PluginError) as caught:
        routes_of(path)
    assert [word for word in words if word not in str(caught.value)] == []


def test_routes_of_two_plugins_collide_with_both_names(write: Write) -> None:
    one = write("first", ROUTE.format(name="first", body="One"))
    two = write("second", ROUTE.format(name="second", body="Two"))
    with pytest.raises(PluginError, match=r"'POST /shout' among routes: \S*first.py and \S*second.py"):
        routes_of(one, two)


def test_a_body_with_the_name_of_one_of_ours_is_refused(write: Write) -> None:
    with pytest.raises(PluginError, match=r"own_names:ChatBody has the name of .*chat:ChatBody"):
        routes_of(write("own_names", ROUTE.format(name="own_names", body="ChatBody")))


def test_a_command_runs_once_its_plugin_is_named(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("greeting", COMMAND.format(name="greeting", command="greet"))
    assert main(["greet"]) == 2
    assert main(["greet", "--plugins", path, "--name", "me"]) == 3
    monkeypatch.setenv("ENGINE_PLUGINS", path)
    assert main(["greet"]) == 3
    assert capsys.readouterr().out == "hello me\nhello you\n"
    assert main(["greet", "--name", "nobody"]) == 2
    assert main(["greet", "--nam", "x"]) == 2
    said = capsys.readouterr().err
    assert "error: --name nobody is no name" in said and "unknown option --nam; did you mean '--name'?" in said
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Greet somebody" in capsys.readouterr().out


def test_a_command_with_the_name_of_ours_is_refused(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("serving", COMMAND.format(name="serving", command="chat"))
    assert main(["greet", "--plugins", path]) == 2
    assert "'chat' of" in (said := capsys.readouterr().err) and "serving.py has the name of engine's own" in said
