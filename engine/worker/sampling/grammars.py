"""Grammars of rows: a matcher for each on the host, and masks over the logits that they are sampled from.

    step n+1   launch ── model, head ─────────────────────────> masks ── adjust, draw
    host              wait for the tokens of n ── accept ── fill ──┘

The masks of a step are filled while the device computes it, by all of its matchers at a time. They are applied by the
kernel that draws, or by one of their own before it. Rows in a state that any row of their grammar has been in are not
asked: the mask is on the device already (mask_table.py). A row that was retracted comes back with its tokens, which its
new matcher reads. Grammars come from the scheduler and are made ready in a thread. Left out: tokens that a grammar
leaves no choice about are sampled like others.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.errors import EngineError
from engine.grammars.engines import Engines, grammar_engines
from engine.kernels.logits.reference import LogitOps
from engine.layers.batch import upload
from engine.messages.assets import Bound, Load, Loaded
from engine.messages.grammars import GRAMMAR, PackedGrammar
from engine.messages.step import SlotAdmit
from engine.plugin.hookspecs import GrammarEntry
from engine.plugin.registry import Plugins
from engine.plugin.specs import Checkpoint, CompiledGrammar, GrammarEngine, Vocabulary
from engine.runtime.processors import processors
from engine.worker.sampling.mask_table import ALL, ENDS, Lines, MaskTable

log = logging.getLogger("engine.worker")

MOST_THREADS = 16  # that fill masks
NO_TOKEN = (
    "the grammar and what else the request asks for (allowed_token_ids, bad_words, logit_bias) leave no token to go on "
    "with; loosen one"
)


@dataclass(slots=True, eq=False)
class Guide:
    """One row's way through its grammar."""

    number: int
    engine: GrammarEngine | None
    matcher: Any
    after: bytes  # what the grammar begins behind, until it has come
    watched: bool  # whether other wishes of its client may bar what the grammar lets through
    tail: bytes = b""  # the end of what was said before the grammar began
    ended: bool = False
    cause: str = ""  # why it cannot go on
    known: Lines = field(default_factory=dict)  # of masks of its grammar

    def pass_by(self, spelled: bytes) -> None:
        """A token before the grammar. It begins behind the one with the end of `after`."""
        heard = self.tail + spelled
        if self.after in heard:
            self.after, heard = b"", b""
        self.tail = heard[max(0, len(heard) - len(self.after) + 1) :]  # what may be the beginning of it


def cannot_go_on(error: str) -> str:
    """What a client is told whose grammar has outgrown its engine."""
    return f"the grammar cannot go on: {error[:300]}; simplify it"


@dataclass(slots=True)
class _Group:
    """Rows of a step whose grammars one engine has, and that go on in them."""

    engine: GrammarEngine
    rows: list[int] = field(default_factory=list)
    guides: list[Guide] = field(default_factory=list)
    matchers: list[Any] = field(default_factory=list)
    known: list[Lines] = field(default_factory=list)  # of each row's grammar, lines by state


class Guided:
    """The sampled rows of a step that have a grammar, and their guides. They are sorted once, and not again before one
    of them ends, cannot go on, or begins: most steps have the rows of the step before."""

    __slots__ = ("ended", "groups", "guides", "rows", "sorted", "stuck", "waiting", "watched")

    def __init__(self, rows: Sequence[int], guides: Sequence[Guide]) -> None:
        self.rows = rows
        self.guides = guides
        self.sorted = False

    def sort(self) -> None:
        if self.sorted:
            return
        self.sorted = True
        groups: dict[int, _Group] = {}
        self.waiting: list[tuple[int, Guide]] = []  # for what comes before the grammar
        self.ended: list[int] = []
        self.stuck: list[tuple[int, Guide]] = []
        self.watched = False
        for row, guide in zip(self.rows, self.guides, strict=True):
            if guide.cause:
                self.stuck.append((row, guide))
            elif guide.after:
                self.waiting.append((row, guide))
            elif guide.ended:
                self.ended.append(row)
            else:
                assert guide.engine is not None
                group = groups.setdefault(id(guide.engine), _Group(guide.engine))
                group.rows.append(row)
                group.guides.append(guide)
                group.matchers.append(guide.matcher)
                group.known.append(guide.known)
                self.watched |= guide.watched
        self.groups = list(groups.values())


class GrammarStart:
    """Grammar engines on their way, in a thread beside the loading of the model: reading a vocabulary takes a while."""

    def __init__(self, config: Config, entries: Sequence[GrammarEntry], checkpoint: Checkpoint, size: int) -> None:
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._made = self._thread.submit(self._make, config, entries, checkpoint, size)

    def _make(
        self, config: Config, entries: Sequence[GrammarEntry], checkpoint: Checkpoint, size: int
    ) -> tuple[Engines, Vocabulary]:
        from engine.grammars.vocabulary import read_vocabulary  # here, beside the loading: it takes a while too

        vocabulary = read_vocabulary(checkpoint, config, size)
        threads = max(1, min(MOST_THREADS, processors() - 1))
        engines = Engines(entries, vocabulary, threads=threads, whitespace=config.grammar.json_whitespace)
        if vocabulary.eos_ids:
            engines.warm_up()
        return engines, vocabulary

    def ready(self, slots: int, device: torch.device, kernels: LogitOps) -> "Grammars | None":
        """None for a model without an end token: no reply under a grammar could end."""
        engines, vocabulary = self._made.result()
        if not vocabulary.eos_ids:
            return None
        return Grammars(engines, self._thread, vocabulary, slots=slots, device=device, kernels=kernels)


def begin_grammars(config: Config, plugins: Plugins, checkpoint: Checkpoint, size: int) -> GrammarStart | None:
    """None where no grammar engine is installed. `size` is the model's number of tokens."""
    entries = grammar_engines(plugins)
    return GrammarStart(config, entries, checkpoint, size) if entries else None


class Grammars:
    """The grammars that the device has been sent, and the guides of its slots. The Loader of the kind "grammar"."""

    def __init__(
        self,
        engines: Engines,
        thread: ThreadPoolExecutor,
        vocabulary: Vocabulary,
        *,
        slots: int,
        device: torch.device,
        kernels: LogitOps,
    ) -> None:
        self._kernels = kernels
        self._engines = engines
        self._thread = thread
        self._spelled = vocabulary.tokens
        self._ends = frozenset(vocabulary.eos_ids)
        self._end_ids = torch.tensor(sorted(self._ends), dtype=torch.int64, device=device)
        self._table = MaskTable(len(vocabulary.tokens), vocabulary.eos_ids, slots, device)
        self._known: dict[int, Lines] = {}  # by grammar
        self._device = device
        self._guides: list[Guide | None] = [None] * slots
        self._last: tuple[bytes, Guided | None] | None = None  # slots of the last step, and what they have
        self._new: dict[int, tuple[SlotAdmit, Bound]] = {}  # by slot, whose guides are still to be made
        self._loaded: dict[int, tuple[GrammarEngine, CompiledGrammar] | str] = {}  # a text says why it is not there

    # ── grammars come and go ─────────────────────────────────────────────────────────────────

    def load(self, message: Load, tell: Callable[[Loaded], None]) -> None:
        """Get a grammar ready in a thread, then `tell`."""
        self._thread.submit(self._load, message, tell)

    def _load(self, message: Load, tell: Callable[[Loaded], None]) -> None:
        made: tuple[GrammarEngine, CompiledGrammar] | str
        try:
            packed = msgspec.msgpack.decode(message.payload, type=PackedGrammar)
            engine = self._engines.named(packed.engine)
            made = engine, engine.load(packed.grammar, packed.packed)
        except Exception as error:  # of a library; it is this grammar's alone
            log.exception("grammar %d cannot be loaded", message.number)
            said = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            made = f"the compiled grammar cannot be used: {said}"
        self._loaded[message.number] = made
        tell(Loaded(message.kind, message.number, made if isinstance(made, str) else ""))

    def drop(self, number: int) -> None:
        """No row will come with it again; those that have it keep it."""
        self._loaded.pop(number, None)
        self._table.forget(self._known.pop(number, {}))

    # ── rows ─────────────────────────────────────────────────────────────────────────────────

    def admit(self, admit: SlotAdmit) -> None:
        """From now on the slot follows the grammar of `admit`, whose tokens so far it reads; or none. Its guide is made
        when it is first sampled, while the device computes."""
        self._guides[admit.slot] = self._last = None
        self._new.pop(admit.slot, None)
        for bound in admit.bound:
            if bound.kind == GRAMMAR:
                self._new[admit.slot] = admit, bound

    def _guide(self, admit: SlotAdmit, bound: Bound) -> Guide:
        found = self._loaded[bound.number]
        sampling = admit.sampling
        watched = bool(sampling.min_tokens or sampling.allowed_ids or sampling.bad_words)
        number, after = bound.number, bound.use
        if isinstance(found, str):
            return Guide(number, None, None, after, watched, cause=found)
        engine, compiled = found
        known = self._known.setdefault(number, {})
        guide = Guide(number, engine, compiled.matcher(), after, watched, known=known)
        alone = Guided([0], [guide])
        for token in np.frombuffer(admit.ids, "<i4")[admit.prompt_len :].tolist():
            self.accept(alone, [token])
        return guide

    def guided(self, slots: np.ndarray) -> Guided | None:
        """The rows of a step, sampled in `slots`, that have a grammar."""
        if self._last is not None and self._last[0] == slots.tobytes():
            return self._last[1]
        places = slots.tolist()
        for slot in self._new.keys() & set(places):
            self._guides[slot] = self._guide(*self._new.pop(slot))
        guides = [self._guides[slot] for slot in places]
        rows = [row for row, guide in enumerate(guides) if guide is not None]
        guided = Guided(rows, [guide for guide in guides if guide is not None]) if rows else None
        self._last = slots.tobytes(), guided
        return guided

    def accept(self, guided: Guided, tokens: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """Advance the guides of a step by its tokens; the rows that cannot go on, each with the reason."""
        guided.sort()
        stuck = guided.stuck
        for group in guided.groups:
            heard = [tokens[row] for row in group.rows]
            taken = group.engine.accept(group.matchers, heard)
            if not self._ends.isdisjoint(heard):
                for guide, token in zip(group.guides, heard, strict=True):
                    guide.ended = token in self._ends
                guided.sorted = False
            if not all(taken):
                refused = [index for index, each in enumerate(taken) if not each]
                for index in refused:
                    error = group.matchers[index].error
                    group.guides[index].cause = cannot_go_on(error) if error else NO_TOKEN
                stuck = stuck + [(group.rows[index], group.guides[index]) for index in refused]
                guided.sorted = False
        for row, guide in guided.waiting:
            guide.pass_by(self._spelled[tokens[row]])
            guided.sorted &= bool(guide.after)
        return tuple((row, guide.cause) for row, guide in stuck)

    # ── masks ────────────────────────────────────────────────────────────────────────────────

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compiles what `mask` needs for logits of `dtype`."""
        logits = torch.zeros(1, len(self._spelled), dtype=dtype, device=self._device)
        self._kernels.apply_bitmask(logits, self.masks, *torch.tensor([[0], [ALL]], device=self._device))

    def mask(self, logits: Tensor, guided: Guided) -> None:
        """-inf, in place, for what the grammars of `logits` [S, V] bar, once the guides have read all tokens."""
        guided.sort()
        rows, lines, forced = self._lines(guided)
        if not rows:
            return
        count = len(rows)
        numbers = upload(np.array(rows + lines + self._table.new, np.int64), self._device)
        self._table.send(numbers[2 * count :])
        self._kernels.apply_bitmask(logits, self._table.masks, numbers[:count], numbers[count : 2 * count])
        if forced:  # other wishes do not hold up the end
            logits[upload(np.array(forced, np.int64), self._device)[:, None], self._end_ids] = 0.0

    @property
    def masks(self) -> Tensor:
        """[lines, words] int32, on the device, always in the same place."""
        return self._table.masks

    def lines(self, guided: Guided, count: int) -> np.ndarray:
        """The line of `masks` for each of the `count` rows of a step whose rows ask for nothing else, [count] int64,
        once the guides have read all tokens; what is new of `masks` goes up."""
        guided.sort()
        rows, lines, _ = self._lines(guided)
        if self._table.new:
            self._table.send(upload(np.array(self._table.new, np.int64), self._device))
        everywhere = np.full(count, ALL, np.int64)
        everywhere[rows] = lines
        return everywhere

    def _lines(self, guided: Guided) -> tuple[list[int], list[int], list[int]]:
        """The rows that have masks, the line of each; and those of them that must end."""
        table = self._table
        table.begin()
        rows, lines = list(guided.ended), [ENDS] * len(guided.ended)
        found: list[list[Any]] = [
            [known.get(matcher.state) for known, matcher in zip(group.known, group.matchers, strict=True)]
            for group in guided.groups
        ]
        for each in found:  # before any is given away
            table.touch(np.array([line for line in each if line is not None], np.int64))
        forced = list(guided.ended)
        for group, each in zip(guided.groups, found, strict=True):
            if None in each:
                self._fill(group, each)
                guided.sorted &= not any(guide.cause for guide in group.guides)
            rows += group.rows
            lines += each
            if guided.watched:
                forced += [
                    row
                    for row, guide, line in zip(group.rows, group.guides, each, strict=True)
                    if guide.watched and table.only_ends[line]
                ]
        return rows, lines, forced

    def _fill(self, group: _Group, lines: list[Any]) -> None:
        """Masks for the rows of `group` that have no line: they get one, in `lines`."""
        table = self._table
        alone: list[int] = []  # without a state
        first: dict[tuple[int, Hashable], int] = {}  # by a grammar's state: who fills it
        twins: list[tuple[int, int]] = []
        for index, line in enumerate(lines):
            if line is not None:
                continue
            state = group.matchers[index].state
            if state is None:
                alone.append(index)
            elif (other := first.setdefault((id(group.known[index]), state), index)) != index:
                twins.append((index, other))
        filled = [*first.values(), *alone]
        taken = table.take(len(first)) + [table.own(group.rows[index]) for index in alone]
        masks, places = table.place(taken)
        group.engine.fill([group.matchers[index] for index in filled], masks, places)
        for index, line, place in zip(filled, taken, places, strict=True):
            guide, state = group.guides[index], group.matchers[index].state
            lines[index] = line
            if error := guide.matcher.error:
                guide.cause = cannot_go_on(error)
                lines[index] = ALL
                continue
            if state is not None or guide.watched:
                table.look(line, masks[place])
            if state is not None:
                table.remember(line, guide.known, state)
        for index, other in twins:
            lines[index] = lines[other]
            group.guides[index].cause = group.guides[other].cause
