"""The same done with many things at once."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import anyio

from engine.runtime.actor import first_failure

Item = TypeVar("Item")
Result = TypeVar("Result")


async def together(
    use: Callable[[Item], Awaitable[Result]], items: Sequence[Item], most: int | None = None
) -> list[Result]:
    """What `use` makes of each item, all at once, or `most` at a time; the first failure ends them."""
    results: list[Any] = [None] * len(items)
    room = nullcontext() if most is None else anyio.Semaphore(most)

    async def one(index: int) -> None:
        async with room:
            results[index] = await use(items[index])

    try:
        async with anyio.create_task_group() as group:
            for index in range(len(items)):
                group.start_soon(one, index)
    except BaseExceptionGroup as failures:
        raise first_failure(failures) from None
    return results
