"""Grammars of rows: a matcher for each on the host, and masks over the logits that they are sampled from.

    step n+1   launch ── model, head ─────────────────────────> masks ── adjust, draw
    host              wait for the tokens of n ── accept ── fill ──┘

The masks of a step are filled while the device computes it, by all of its matchers at a time, and applied in one
kernel. Rows without a grammar are not touched. Rows that have come the same way, as replies to one prompt do, share one
mask. A row that was retracted comes back with its tokens, which its new matcher reads. Grammars come from the scheduler
and are made ready in a thread. Left out: tokens that a grammar leaves no choice about are sampled like others.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.errors import EngineError
from engine.grammars.engines import Engines
from engine.kernels.bitmask import apply_bitmask
from engine.layers.batch import upload
from engine.messages import GrammarLoaded, LoadGrammar, SlotAdmit
from engine.plugin.manager import Plugins
from engine.plugin.specs import Checkpoint, CompiledGrammar, GrammarEngine, GrammarEntry, Vocabulary

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
    way: int = 0  # the same for rows that have come the same way

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
class _Lines:
    """The lines of a step's masks while they are filled: those of one engine's matchers."""

    matchers: list[Any] = field(default_factory=list)
    guides: list[Guide] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


Guided = tuple[tuple[int, Guide], ...]  # sampled row of a step, and its guide


class Beginning:
    """Grammars on their way, in a thread beside the loading of the model: a vocabulary takes a while to take in."""

    def __init__(self, config: Config, entries: Sequence[GrammarEntry], checkpoint: Checkpoint, size: int) -> None:
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._made = self._thread.submit(self._make, config, entries, checkpoint, size)

    def _make(
        self, config: Config, entries: Sequence[GrammarEntry], checkpoint: Checkpoint, size: int
    ) -> tuple[Engines, Vocabulary]:
        from engine.grammars.vocabulary import read_vocabulary  # here, beside the loading: it takes a while too

        vocabulary = read_vocabulary(checkpoint, config, size)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, min(MOST_THREADS, cores - 1))
        engines = Engines(entries, vocabulary, threads=threads, whitespace=config.grammar.json_whitespace)
        if vocabulary.eos_ids:
            engines.warm_up()
        return engines, vocabulary

    def ready(self, slots: int, device: torch.device) -> "Grammars | None":
        """None for a model without an end token: no reply under a grammar could end."""
        engines, vocabulary = self._made.result()
        return Grammars(engines, self._thread, vocabulary, slots, device) if vocabulary.eos_ids else None


def begin_grammars(config: Config, plugins: Plugins, checkpoint: Checkpoint, size: int) -> Beginning | None:
    """None where no grammar engine is installed. `size` is the model's number of tokens."""
    entries = plugins.grammar_engines()
    return Beginning(config, entries, checkpoint, size) if entries else None


class Grammars:
    """The grammars that the device has been sent, and the guides of its slots."""

    def __init__(
        self, engines: Engines, thread: ThreadPoolExecutor, vocabulary: Vocabulary, slots: int, device: torch.device
    ) -> None:
        self._engines = engines
        self._thread = thread
        self._spelled = vocabulary.tokens
        self._ends = frozenset(vocabulary.eos_ids)
        self._end_ids = torch.tensor(sorted(self._ends), dtype=torch.int64, device=device)
        words = -(-len(vocabulary.tokens) // 32)
        ends = np.isin(np.arange(32 * words), vocabulary.eos_ids)
        self._end_mask = np.packbits(ends, bitorder="little").view("<i4")
        self._host = torch.zeros(slots, words, dtype=torch.int32, pin_memory=device.type != "cpu")
        self._masks: np.ndarray = self._host.numpy()
        self._device = device
        self._guides: list[Guide | None] = [None] * slots
        self._new: dict[int, SlotAdmit] = {}  # by slot, whose guides are still to be made
        self._changed = threading.Condition()
        self._loaded: dict[int, tuple[GrammarEngine, CompiledGrammar] | str] = {}  # a text says why it is not there

    # ── grammars come and go ─────────────────────────────────────────────────────────────────

    def load(self, message: LoadGrammar, tell: Callable[[GrammarLoaded], None]) -> None:
        """Get a grammar ready in a thread, then `tell`."""
        self._thread.submit(self._load, message, tell)

    def _load(self, message: LoadGrammar, tell: Callable[[GrammarLoaded], None]) -> None:
        made: tuple[GrammarEngine, CompiledGrammar] | str
        try:
            engine = self._engines.named(message.engine)
            made = engine, engine.load(message.grammar, message.packed)
        except Exception as error:  # of a library; it is this grammar's alone
            log.exception("a grammar of %s cannot be loaded", message.engine)
            said = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            made = f"the compiled grammar cannot be used: {said}"
        with self._changed:
            self._loaded[message.number] = made
            self._changed.notify_all()
        tell(GrammarLoaded(message.number, made if isinstance(made, str) else ""))

    def drop(self, number: int) -> None:
        """No row will come with it again; those that have it keep it."""
        with self._changed:
            self._loaded.pop(number, None)

    # ── rows ─────────────────────────────────────────────────────────────────────────────────

    def admit(self, admit: SlotAdmit) -> None:
        """From now on the slot follows the grammar of `admit`, whose tokens so far it reads; or none. Its guide is made
        when it is first sampled, while the device computes."""
        self._guides[admit.slot] = None
        self._new.pop(admit.slot, None)
        if admit.grammar:
            self._new[admit.slot] = admit

    def _guide(self, admit: SlotAdmit) -> Guide:
        with self._changed:  # it is there, but right after the start of a device whose forerunner was lost
            self._changed.wait_for(lambda: admit.grammar in self._loaded)
            found = self._loaded[admit.grammar]
        sampling = admit.sampling
        watched = bool(sampling.min_tokens or sampling.allowed_ids or sampling.bad_words)
        after = admit.after.encode()
        if isinstance(found, str):
            return Guide(admit.grammar, None, None, after, watched, cause=found)
        engine, compiled = found
        guide = Guide(admit.grammar, engine, compiled.matcher(), after, watched)
        for token in np.frombuffer(admit.ids, "<i4")[admit.prompt_len :].tolist():
            self.accept(((0, guide),), [token])
        return guide

    def guided(self, slots: np.ndarray) -> Guided:
        """The rows of a step, sampled in `slots`, that have a grammar."""
        if self._new:
            for slot in self._new.keys() & set(slots.tolist()):
                self._guides[slot] = self._guide(self._new.pop(slot))
        return tuple((row, guide) for row, slot in enumerate(slots.tolist()) if (guide := self._guides[slot]))

    def accept(self, guided: Guided, tokens: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """Advance the guides of a step by its tokens; the rows that cannot go on, each with the reason."""
        groups: dict[int, _Lines] = {}
        for row, guide in guided:
            token = tokens[row]
            if guide.cause or guide.ended:
                continue
            if guide.after:
                guide.pass_by(self._spelled[token])
                continue
            group = groups.setdefault(id(guide.engine), _Lines())
            group.matchers.append(guide.matcher)
            group.guides.append(guide)
            group.lines.append(token)
        for group in groups.values():
            engine = group.guides[0].engine
            assert engine is not None
            for guide, token, taken in zip(
                group.guides, group.lines, engine.accept(group.matchers, group.lines), strict=True
            ):
                guide.way = hash((guide.way, token))
                guide.ended = token in self._ends
                guide.cause = "" if taken else cannot_go_on(guide.matcher.error) if guide.matcher.error else NO_TOKEN
        return tuple((row, guide.cause) for row, guide in guided if guide.cause)

    # ── masks ────────────────────────────────────────────────────────────────────────────────

    def mask(self, logits: Tensor, guided: Guided) -> None:
        """-inf, in place, for what the grammars of `logits` [S, V] bar, once the guides have read all tokens."""
        rows, forced = self._fill(guided)
        if not rows:
            return
        where = upload(np.array(rows, np.int64), self._device)
        apply_bitmask(logits, self._host[: len(rows)].to(self._device, non_blocking=True), where)
        if forced:  # other wishes do not hold up the end
            logits[upload(np.array(forced, np.int64), self._device)[:, None], self._end_ids] = 0.0

    def _fill(self, guided: Guided) -> tuple[list[int], list[int]]:
        """The rows that have masks, in the order of the masks' lines; and those of them that must end."""
        rows: list[int] = []
        forced: list[int] = []
        groups: dict[int, _Lines] = {}
        first: dict[tuple[int, int], int] = {}
        twins: list[tuple[int, int]] = []
        watched: list[tuple[int, int]] = []
        for row, guide in guided:
            if guide.cause or guide.after:
                continue
            line = len(rows)
            rows.append(row)
            if guide.ended:  # its client wants more tokens: it has said all it may
                self._masks[line] = self._end_mask
                forced.append(row)
                continue
            if guide.watched:
                watched.append((line, row))
            twin = first.setdefault((guide.number, guide.way), line)
            if twin != line:
                twins.append((line, twin))
                continue
            group = groups.setdefault(id(guide.engine), _Lines())
            group.matchers.append(guide.matcher)
            group.guides.append(guide)
            group.lines.append(line)
        for group in groups.values():
            engine = group.guides[0].engine
            assert engine is not None
            engine.fill(group.matchers, self._masks, group.lines)
            for guide, line in zip(group.guides, group.lines, strict=True):
                if error := guide.matcher.error:
                    guide.cause = cannot_go_on(error)
                    self._masks[line] = -1
        for line, twin in twins:
            self._masks[line] = self._masks[twin]
        forced += [row for line, row in watched if not (self._masks[line] & ~self._end_mask).any()]
        return rows, forced
