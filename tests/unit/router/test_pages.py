"""docs/router.md names every route, metric and header of the router; the example runs as its docstring says."""

import re
import runpy
from pathlib import Path

import anyio.to_thread
import pytest
from http_front import FakeFront, chunks, serving
from routed import routing

from engine.options.option import options_of
from engine.router.app import ROUTES
from engine.router.asked import SESSION_HEADERS
from engine.router.dispatch import PATIENCE
from engine.router.options import HealthOptions, QueueOptions, RouterOptions, resolve_router
from engine.router.router import Router

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "router.md").read_text()
pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_in_the_docs(route) -> None:
    if not route.path.endswith("/"):
        path = route.path.replace(":.+}", "}")  # an id may have slashes, of which readers need not know
        assert f"`{path}" in PAGE or f"`{route.method} {path}" in PAGE
    assert route.handler.__doc__


def test_every_option_and_header_is_in_the_docs() -> None:
    options = [each.flag for group in (RouterOptions, HealthOptions, QueueOptions) for each in options_of(group)]
    elsewhere = {"--plugins", "--connect-timeout"}
    assert {flag for flag in options if flag not in PAGE} <= elsewhere
    for header in (*SESSION_HEADERS, PATIENCE):
        assert f"`{header}`" in PAGE


async def test_every_metric_is_in_the_docs_and_no_other() -> None:
    page = Router(resolve_router({"policy": "round_robin"}, {})).metrics.page("")[0].decode()
    names = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    written = set(re.findall(r"`(engine_router_\w+)`", PAGE))
    assert {name for name in names if not name.endswith("_created")} == written


async def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    front = FakeFront(chunks("The Nile", "."))
    async with serving(front) as worker, routing(worker, policy="cache_aware") as (url, _):
        monkeypatch.setenv("ENGINE_URL", url)
        path = str(ROOT / "examples" / "router" / "conversation.py")
        await anyio.to_thread.run_sync(lambda: runpy.run_path(path, run_name="__main__"))
        out = capsys.readouterr().out
    assert out.count("'The Nile.'") == 3 and out.count(f"to {worker}: ") == 3
    matched = [int(count) for count in re.findall(r"(\d+) of \d+ characters", out)]
    assert matched[0] == 0 and 0 < matched[1] <= matched[2]
    assert all(asked.sampling.max_tokens for asked in front.asked)
