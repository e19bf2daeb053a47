"""`engine experts`: what it draws of a map, and where it asks."""

import io

import pytest
from rich.console import Console
from test_http_routes import open_site

from engine.client.experts import Map, Window, bars, drawn, fetch, heat
from engine.client.options import ExpertsOptions

MAP = Map(
    layers=(1, 3),
    ranks=2,
    counts=[[0, 10, 20, 10], [80, 0, 0, 0]],
    loads=[[30, 10], [80, 0]],
    balance=[1.5, 2.0],
    moved=1,
    waiting=0,
    windows=[Window(256, 100, 1.75, 0.0), Window(512, 20, 1.25, 0.5)],
)


def text_of(found: Map, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(drawn(found, width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_heat_map_has_a_line_for_each_layer() -> None:
    lines = text_of(MAP, 100)
    assert lines[0].split() == ["layer", "experts", "0", "to", "3", "ranks", "balance", "busiest"]
    assert lines[1].split() == ["1", "▒▓▒", "█▃", "1.50", "2", "(2.0)"]
    assert lines[2].split() == ["3", "█", "█▁", "2.00", "0", "(4.0)"]
    assert "1.25, so far █▃" in lines[4] and "50.0% of choices, at step 512" in lines[5]
    assert lines[6] == "1 layer rearranged, 0 to come"


def test_neighbours_share_a_cell_where_there_is_no_room() -> None:
    counts = [1] * 31 + [100]
    assert heat(counts, together=16).plain == " █"  # the first 16 have 1 of a mean of 4.1
    assert bars([0, 0]) == "▁▁" and bars([]) == ""
    wide = Map((0,), 1, [[1] * 256], [[256]], [1.0], 0, 0, [])
    assert "a cell is 32 experts" in " ".join(text_of(wide, 50))


@pytest.mark.anyio
async def test_the_server_is_asked_for_its_map() -> None:
    async with open_site() as site:
        found = await fetch(str(site.session._base_url), None)
    assert found.layers == (1, 3) and found.windows[-1].balance == 1.25
    assert ExpertsOptions().url.startswith("http://")
