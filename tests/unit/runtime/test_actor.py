"""Supervision: what is said of an actor that fails, however deep in its own tasks."""

import anyio
import pytest

from engine.errors import ConfigError
from engine.runtime.actor import ActorError, supervise

pytestmark = pytest.mark.anyio


class Failing:
    name = "failing"

    def __init__(self, error: Exception, nested: bool) -> None:
        self.error, self.nested = error, nested

    async def fail(self) -> None:
        raise self.error

    async def run(self) -> None:
        if not self.nested:
            await self.fail()
        async with anyio.create_task_group() as group:
            group.start_soon(self.fail)


@pytest.mark.parametrize("nested", [False, True])
async def test_the_error_itself_is_named(nested: bool) -> None:
    with pytest.raises(ActorError) as failed:
        async with supervise(Failing(RuntimeError("no more"), nested)):
            await anyio.sleep_forever()
    assert str(failed.value) == "the failing actor failed: RuntimeError('no more')"
    assert isinstance(failed.value.__cause__, RuntimeError)


@pytest.mark.parametrize("nested", [False, True])
async def test_an_error_for_people_is_raised_as_it_is(nested: bool) -> None:
    with pytest.raises(ConfigError, match=r"^say --this$"):
        async with supervise(Failing(ConfigError("say --this"), nested)):
            await anyio.sleep_forever()
