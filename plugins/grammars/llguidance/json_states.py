"""States of replies under a JSON schema: replies in one state have the same mask and the same continuations.

    (state, token) ──> state        looked up; read in json_places.py when it is first met
        state ──────> mask          filled by a matcher that is led there once, then kept

So a reply has no matcher of its own, and each of its tokens is one table look-up. The effect of ordinary characters on
a free string depends only on their number, so there is an entry for each length and not for each of 100,000 tokens. A
long array with bounds would have every state once for each item; instead its items are counted beside the state, and
the state holds only as much of the count as one token can see. A matcher of the reply's own handles anything that is
not understood or not allowed.
"""

import re
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.plugin import Vocabulary
from engine_plugins.grammars.llguidance.json_places import STRING, Node, Place, Unknown, advance, read_schema

MOST_STATES = 20_000  # of a grammar
MOST_MOVES = 400_000
MOST_LED = 2_000_000  # tokens of all paths
MOST_OF_ALL = 200_000  # states of all grammars: some 200 MB
KEPT = 96 << 20  # bytes of masks, of all grammars
END = Place(mode=-1)
Ahead = tuple[Place, int, bool]  # a place, and how many items are then, or are more, if that is True
INDENT, BEGINNING = re.compile(rb"\n[ \t]+"), re.compile(rb"^[ \t]+")


def _spaced(found: "re.Match[bytes]") -> bytes:
    return found[0].replace(b"\t", b" ")


class Texts:
    """What one vocabulary needs: its tokens, of which `ends` end a reply; how many items one token may end, and one
    more (`seen`); keys by which tokens are told apart; and room for masks that have been filled, and for states.

    Keys of tokens that do the same wherever they may come are the same: behind a new line a tab is as good as a space.
    `keys` are those of any state, `indented` of one behind a new line, `free` of one in a free string, where ordinary
    tokens are told apart by their lengths (0 for others), of which these are the keys below 0."""

    def __init__(self, vocabulary: Vocabulary, lengths: list[int]) -> None:
        tokens = self.tokens = vocabulary.tokens
        self.ends = frozenset(vocabulary.eos_ids)
        self.keys, self.indented = list(range(len(tokens))), list(range(len(tokens)))
        first = {token: id for id, token in enumerate(tokens) if id not in vocabulary.special}
        for id, token in enumerate(tokens):
            if b"\t" in token and id not in vocabulary.special:
                self.keys[id] = first.setdefault(INDENT.sub(_spaced, token), id)
                self.indented[id] = first.setdefault(INDENT.sub(_spaced, BEGINNING.sub(_spaced, token)), id)
        below = {length: -length for length in set(lengths)}  # one object of each, as a cache likes it
        self.free = [below[length] or key for length, key in zip(lengths, self.keys, strict=True)]
        several = (sum(part != b"" for part in token.split(b",")) for token in tokens if b"," in token)
        self.seen = 2 + max([1, *several])  # no token may have a comma
        words = -(-len(tokens) // 32)
        self._kept = np.empty((max(64, KEPT // (4 * words)), words), np.int32)  # no memory before it is used
        self._used = 0
        self._age = 0  # how often it was full
        self.grammars: weakref.WeakSet[States] = weakref.WeakSet()
        self._told = 0  # states of all grammars, and of some that are no more

    def mask(self, state: "State") -> np.ndarray | None:
        """The mask of `state`, if it is kept."""
        return self._kept[state.line] if state.age == self._age else None

    def keep(self, state: "State", mask: np.ndarray) -> None:
        if self._used == len(self._kept):
            self._used, self._age = 0, self._age + 1
        state.line, state.age = self._used, self._age
        self._kept[self._used] = mask
        self._used += 1

    def make_room(self) -> None:
        """Make room for one more state: if all grammars together have the most allowed, the one with the most begins
        anew."""
        self._told += 1
        if self._told < MOST_OF_ALL:
            return
        self._told = sum(len(states.known) for states in self.grammars)
        if self._told >= MOST_OF_ALL:
            most = max(self.grammars, key=lambda states: len(states.known))
            self._told -= len(most.known)
            most.forget()


class State:
    """One state. `moves` has the next one by the key of a token, which `keys` has; for tokens that change the number of
    items, what it follows from. `path` are tokens that lead to it, with `items` in the long array."""

    __slots__ = ("age", "items", "keys", "line", "moves", "path", "place")

    def __init__(self, place: Place, keys: list[int], path: tuple[int, ...], items: int) -> None:
        self.place = place
        self.keys = keys
        self.moves: dict[int, State | Ahead] = {}
        self.path = path
        self.items = items
        self.line = -1  # of its mask, among those that are kept
        self.age = -1


class States:
    """The states of one grammar. A reply begins in `begin`."""

    def __init__(self, nodes: list[Node], texts: Texts) -> None:
        self._nodes = nodes
        self._texts = texts
        self._long = frozenset(
            at for at, node in enumerate(nodes) if node.kind == "array" and max(node.least, node.most or 0) > texts.seen
        )
        self._moves = 0
        self._led = 0
        self.known: dict[tuple[Place, tuple[int, int, bool]], State] = {}
        self._ahead: dict[tuple[State, int, int], tuple[State, int]] = {}  # by state, number of items and key
        self.begin = State(Place(), texts.keys, (), 0)
        texts.grammars.add(self)

    def forget(self) -> None:
        """All states. Replies go on from those that they are in."""
        for state in (self.begin, *self.known.values()):
            state.moves.clear()
        self.known.clear()
        self._ahead.clear()
        self._moves = self._led = 0

    def next(self, state: State, items: int, token: int, said: Sequence[int]) -> tuple[State | None, int]:
        """The state after a `token` that may come in `state`, and the number of items then; None if it is unknown.
        `said` is the text of the reply so far."""
        key = state.keys[token]
        if (found := self._ahead.get((state, items, key))) is not None:
            return found
        move = state.moves.get(key)
        if move is None:
            try:
                move = self._move(state.place, items, token)
            except Unknown:
                return None, 0
        assert not isinstance(move, State), "it is to be looked up"
        place, more, goes_on = move
        then = more + items if goes_on else more
        path, led = (*state.path, token), more + state.items if goes_on else more
        if self._sight(place, led) != self._sight(place, then):  # this path leads to another number of items
            path, led = (*said, token), then
        behind = self._state(place, path, led)
        if behind is not None and self._moves < MOST_MOVES:
            self._moves += 1
            plain = (goes_on and not more) or self._long_one(place) < 0
            state.moves[key] = behind if plain else move
            if not plain:
                self._ahead[state, items, key] = behind, then
        return behind, then

    def _move(self, place: Place, items: int, token: int) -> Ahead:
        if token in self._texts.ends:
            return END, 0, False
        at = self._long_one(place)
        if at >= 0:
            place = _with_count(place, at, items)
        then, open = advance(self._nodes, place, self._texts.tokens[token])
        now = self._long_one(then)
        if now < 0:
            return then, 0, False
        goes_on = now == at < open
        count = then.stack[now][1]
        return _with_count(then, now, 0), count - items if goes_on else count, goes_on

    def _state(self, place: Place, path: tuple[int, ...], items: int) -> State | None:
        """That of `place`, in which the count of the outermost long array is left out, at `items` of it."""
        key = place, self._sight(place, items)
        state = self.known.get(key)
        if state is None and len(self.known) < MOST_STATES and self._led < MOST_LED:
            texts = self._texts
            texts.make_room()
            self._led += len(path)
            free = place.mode == STRING and not place.text
            keys = texts.free if free else texts.indented if place.text[:1] == b"\n" else texts.keys
            state = self.known[key] = State(place, keys, path, items)
        elif state is not None and len(path) < len(state.path):
            state.path, state.items = path, items
        return state

    def _sight(self, place: Place, items: int) -> tuple[int, int, bool]:
        """The part of the number of items that one token can see."""
        at = self._long_one(place)
        if at < 0:
            return 0, 0, False
        node, seen = self._nodes[place.stack[at][0]], self._texts.seen
        left = seen if node.most is None else node.most - items
        return min(max(node.least - items, 0), seen), min(left, seen), items > 0

    def _long_one(self, place: Place) -> int:
        """Where in its stack the outermost long array is; else -1."""
        if self._long:
            for at, (node, _) in enumerate(place.stack):
                if node in self._long:
                    return at
        return -1


def _with_count(place: Place, at: int, count: int) -> Place:
    return place._replace(stack=(*place.stack[:at], (place.stack[at][0], count), *place.stack[at + 1 :]))


def states_of(schema: Any, texts: Texts) -> States | None:
    """The states of replies under a JSON schema; None if they cannot be identified."""
    try:
        return States(read_schema(schema), texts)
    except Unknown:
        return None
