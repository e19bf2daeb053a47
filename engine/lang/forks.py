"""Forks of a state: each goes on from where the parent is, and all run at once.

A fork copies text and variables; what it appends is its own. `join` brings their new variables back as lists, or their
text. Left out: forks as one request group of the scheduler; they share the parent's prefix through the cache.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal, Self

from engine.errors import ConfigError
from engine.lang.state import Sequential, arrived, line
from engine.lang.transcript import Transcript
from engine.lang.values import Variable

Joining = Literal["gather_variable", "concate_and_append"]


class Forks(Sequence["State"]):
    """Several forks of one state. `forks += x` appends x to each; where it is a list, its item to each, and where it
    is a function, what that makes of each one's number."""

    def __init__(self, parent: "State", count: int) -> None:
        """Raises ConfigError for a count below 1."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"fork({count!r}); it takes how many forks, a whole number from 1")
        self._parent = parent
        self._known = dict(parent._variables)
        self._start = 0

        def split() -> None:
            self._start = parent._transcript.length
            for fork, begins in zip(self._forks, starts, strict=True):
                fork._failure = parent._failure
                begins.set_result(parent._transcript.copy())

        starts: list[Future[Transcript]] = [Future() for _ in range(count)]
        self._forks = [State(parent._run, begins, self._known) for begins in starts]
        parent._do(split, line())

    def __getitem__(self, index: Any) -> Any:
        return self._forks[index]

    def __len__(self) -> int:
        return len(self._forks)

    def __iter__(self) -> Iterator["State"]:
        return iter(self._forks)

    def __iadd__(self, other: Any) -> Self:
        if isinstance(other, list) and len(other) != len(self):
            raise ConfigError(f"a list of {len(other)} for {len(self)} forks; give one for each")
        for index, fork in enumerate(self._forks):
            fork.append(other(index) if callable(other) else other[index] if isinstance(other, list) else other)
        return self

    def join(self, mode: Joining = "gather_variable") -> None:
        """Each variable that forks have made becomes a list of the parent's, in their order; the parent goes on at
        once. With "concate_and_append" the parent's text goes on with what each of them has said."""
        if mode == "gather_variable":
            place = line()
            names = {name: None for fork in self._forks for name in fork._variables if self._is_new(fork, name)}
            for name in names:
                made = [fork._variables[name] for fork in self._forks if self._is_new(fork, name)]
                gather(made, self._parent._declare(name, place), self._parent)
        elif mode == "concate_and_append":
            self._parent._do(self._append_texts, line())
        else:
            raise ConfigError(f"join({mode!r}); it takes 'gather_variable' or 'concate_and_append'")

    def _is_new(self, fork: "State", name: str) -> bool:
        return name in fork._variables and fork._variables[name] is not self._known.get(name)

    async def _append_texts(self) -> None:
        for fork in self._forks:
            await fork.synced()
            self._parent._say(fork._transcript.text[self._start :])


def gather(made: list[Variable], into: Variable, parent: Sequential) -> None:
    """`into` becomes the list of the values of `made`, once all are there; it fails with the first that fails."""

    async def wait() -> None:
        try:
            into.set([await arrived(each.value) for each in made])
        except Exception as error:
            into.fail(error)

    parent._run.call(lambda: parent._run.start(wait))


class State(Sequential):
    """The state that a program gets: one that forks."""

    def fork(self, size: int = 1) -> Forks:
        """`size` states that go on from here."""
        return Forks(self, size)

    @contextmanager
    def copy(self) -> Iterator["State"]:
        """`with s.copy() as t:` one fork; nothing of it comes back."""
        yield self.fork(1)[0]
