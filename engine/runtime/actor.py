"""Supervision: actors run side by side, and none dies unnoticed.

An actor is a name and one `run` loop over its inbox. `supervise` runs several in one task group: the first
that fails is logged by name with its traceback, its siblings are cancelled, and `ActorError` says which it
was. Restarting is not done here: only the device process is ever restarted (actors/executor.py), because
an actor of ours that raises is a bug whose state cannot be trusted.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import anyio

from engine.errors import EngineError

log = logging.getLogger("engine.runtime.actor")


class Actor(Protocol):
    """`run` returns when its inbox ends and raises when it cannot go on."""

    name: str

    async def run(self) -> None: ...


class ActorError(EngineError):
    """An actor failed; the exception that ended it is the `__cause__`."""


async def _guard(actor: Actor) -> None:
    try:
        await actor.run()
    except Exception as error:
        cause = first_failure(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(cause, EngineError):
            raise
        log.exception("the %s actor failed", actor.name)
        raise ActorError(f"the {actor.name} actor failed: {cause!r}") from cause


@asynccontextmanager
async def supervise(*actors: Actor) -> AsyncIterator[None]:
    """Run `actors` while the block runs; when the block ends they are cancelled, when one fails so is the block.

    Raises the failing actor's own EngineError, or ActorError.
    """
    try:
        async with anyio.create_task_group() as group:
            for actor in actors:
                group.start_soon(_guard, actor, name=actor.name)
            yield
            group.cancel_scope.cancel()
    except BaseExceptionGroup as failures:
        # One failure is enough to say; the rest are siblings that fell with it.
        failure = first_failure(failures)
        raise failure from failure.__cause__


def first_failure(failures: BaseExceptionGroup) -> BaseException:
    """The first leaf of nested exception groups, an EngineError before any other."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [failures]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, EngineError)), leaves[0])
