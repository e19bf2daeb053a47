"""Handlers that are woken together go on a few at a time, and the loop looks at its sockets in between."""

import asyncio
import socket
from contextlib import suppress
from itertools import groupby

import pytest
from test_streams import Site, reply_of

from engine.http.turns import AT_ONCE, Turns

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])]


async def in_turn(turns: Turns, count: int, *, cancelled: range = range(0)) -> list[int | str]:
    """What `count` tasks and a socket that can always be read do, in order; some of the tasks are cancelled at once."""
    done: list[int | str] = []
    ours, other = socket.socketpair()
    with ours, other:
        loop = asyncio.get_running_loop()
        ours.send(b"x")
        loop.add_reader(other, done.append, "socket")

        async def go_on(number: int) -> None:
            await turns.next()
            done.append(number)

        tasks = [loop.create_task(go_on(number)) for number in range(count)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        loop.remove_reader(other)
    return done


async def test_sockets_are_looked_at_between_a_few_handlers() -> None:
    done = await in_turn(Turns(), 3 * AT_ONCE + 1)
    groups = [len(list(each)) for kind, each in groupby(done, key=type) if kind is int]
    assert groups == [AT_ONCE] * 3 + [1]
    assert [number for number in done if number != "socket"] == list(range(3 * AT_ONCE + 1))


async def test_one_that_is_cancelled_takes_nobodys_turn() -> None:
    done = await in_turn(Turns(), 2 * AT_ONCE, cancelled=range(AT_ONCE))
    groups = [list(each) for kind, each in groupby(done, key=type) if kind is int]
    assert groups == [list(range(AT_ONCE, 2 * AT_ONCE))]


async def test_turns_can_be_had_again_once_all_have_gone_on() -> None:
    turns = Turns()
    for _ in range(2):
        assert 0 in await in_turn(turns, 1)


async def test_answers_that_end_in_one_step_end_a_few_at_a_time() -> None:
    """What the last tokens say is written by then."""
    turns = Turns()
    sites = [Site(reply_of("completions", 1), turns=turns) for _ in range(3 * AT_ONCE)]
    for site in sites:
        site.boxes[0].put(site.chunk(0, "a", [1]))
    while not all(site.wire.written for site in sites):
        await asyncio.sleep(0)
    await sites[0].rest()
    for site in sites:
        site.boxes[0].put(site.chunk(0, "b", [2], finish="length"))
    assert all(b'"text":"b"' in site.wire.written[-1] for site in sites)
    ended = []
    while not ended or ended[-1] < len(sites):
        await asyncio.sleep(0)
        ended.append(sum(b"DONE" in site.wire.written[-1] for site in sites))
    assert {after - before for before, after in zip([0, *ended], ended, strict=False)} <= {0, AT_ONCE}
    for site in sites:
        await site.done
