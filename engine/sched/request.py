"""One request as the scheduler knows it: its tokens, its place on the device, and how far the plans have got.

                     computed       len(ids)   sure     most
    ids      ┌──────────┬──────────────┐         ╎        ╎
    tokens   │ in cache │ to compute   │ in flight (of a row that decodes)
             └──────────┴──────────────┘         ╎        ╎
    pages    └shared┴own──────────────────────────────────┘

`computed` runs ahead of the device: it counts what the plans sent will have done. A request decodes once its prompt is
planned to the end. From then on rows.py holds how many tokens it will surely have, and the most that it may have.
"""

from array import array
from dataclasses import dataclass, field

from engine.cache.blocks import Named
from engine.cache.names import PageNames
from engine.cache.pins import Holder
from engine.cache.radix import Node
from engine.messages.assets import Bound
from engine.messages.media import MEDIA, media_use
from engine.messages.request import Admit
from engine.messages.sessions import SessionUse
from engine.messages.step import Logprobs, SlotAdmit
from engine.params.sampling import Sampling
from engine.sched.sessions import Session

NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Shown:
    """Where a prompt shows medium `number`, or a part of it: `count` positions from `begin` on. All of the medium is
    `tokens` embeddings. The positions of a `whole` one see each other. A slice of a clip is a medium here."""

    begin: int
    count: int
    number: int
    tokens: int
    whole: bool


def shown_by(bound: tuple[Bound, ...]) -> tuple[Shown, ...]:
    """What a prompt shows that uses these things, in its order."""
    uses = [(each.number, media_use(each)) for each in bound if each.kind == MEDIA]
    found = [Shown(*span, number, use.tokens, use.whole) for number, use in uses for span in use.spans]
    return tuple(sorted(found, key=lambda shown: shown.begin))


@dataclass(slots=True, eq=False)
class Request:
    """The state of one live request. Positions and lengths are in tokens."""

    rid: str
    arrival: int
    priority: int
    ids: "array[int]"  # int32: the prompt and what was sampled and committed
    keys: "array[int]"  # int32: what the tree knows the prompt by, where that is not its ids; empty for text
    prompt_len: int
    limit: int  # prompt_len + max_new: the length at which it ends
    sampling: Sampling
    stop_ids: frozenset[int]
    salt: bytes  # its prefix is shared with requests of the same salt alone
    bound: tuple[Bound, ...]  # its needs, met
    program: Holder | None = None  # whose call it is, if it is one's
    front: int = 0  # that has sent it
    use: SessionUse | None = None  # the session that it is of,
    session: Session | None = None  # which lives while it runs
    shown: tuple[Shown, ...] = ()  # media, in order
    positions: bytes = b""  # of its prompt, as in Admit
    named: Named | None = None  # the blocks of its text, where somebody is told of them
    names: PageNames | None = None  # of its pages, where there are tiers

    computed: int = 0  # positions; of a request that decodes, rows.py says it
    cached: int = -1  # prompt tokens the cache held when it first ran; -1 before
    began: float = 0.0  # when it first ran, in the seconds of the caller's clock
    first: bool = True  # its first token is still to come
    rise: int = 0  # the move that makes room for its pages or brings them up, while it waits
    rooms: int = 0  # moves that made room for it, since it ran last
    rises: int = 0  # moves that brought some up so far
    risen: int = 0  # pages of these
    waited: int = NEVER  # the first step in which it waited for a prefix that a copy of attention computes
    scored: int = NEVER  # prompt positions whose log-probabilities have come; NEVER when no more are wanted
    scores: list[Logprobs] = field(default_factory=list)  # those that have come and were not passed on

    # Its place on the device, while it runs.
    slot: int = -1
    lane: int = 0  # of a pipeline, while it decodes
    row: int = -1  # in rows.py, while it decodes; so are the next three
    room: int = 0  # tokens that `pages` hold
    span: int = 1  # tokens that it computes in a step at most: its last one and drafts
    ahead: int = 0  # how many tokens more than it surely has it may have once all plans sent have run
    since: int = NEVER  # first step of this stay on the device: results of earlier steps are dropped
    node: Node | None = None  # where its shared prefix ends in the tree; locked by this request
    shared: int = 0  # leading pages that the tree owns
    told: int = 0  # of which lower tiers know so many
    pages: list[int] = field(default_factory=list)
    # Of a model with recurrent layers (states.py):
    state: list[int] = field(default_factory=list)  # pages with the state that it begins with
    marks: list[int] = field(default_factory=list)  # positions of its prompt at which its state is kept, in order
    kept: int = 0  # the last position of which a state is kept, or about to be
    keeps: tuple[int, list[int]] | None = None  # a position of its reply, and the pages with the state there
    leaf: Node | None = None  # of the state that was kept last of its reply
    untold: list[Node] = field(default_factory=list)  # leaves of states that tiers are to be told of

    @classmethod
    def admitted(cls, admit: Admit, arrival: int, bound: tuple[Bound, ...] = ()) -> "Request":
        """A waiting request, from what the tokenizer says; its needs are met as `bound` says."""
        ids = array("i", admit.ids)
        keys = array("i", admit.keys)
        salt = admit.cache_salt.encode()
        assert len(keys) in (0, len(ids)), f"{len(ids)} ids have {len(keys)} keys"
        # Nothing predicts a prompt's first token, nor that before those which are to be scored.
        asks = admit.sampling.prompt_logprobs >= 0 and len(ids) > admit.scored_after + 1
        return cls(
            rid=admit.rid,
            arrival=arrival,
            priority=admit.priority,
            ids=ids,
            keys=keys,
            prompt_len=len(ids),
            limit=len(ids) + admit.max_new,
            sampling=admit.sampling,
            stop_ids=frozenset(admit.stop_ids),
            salt=salt,
            bound=bound,
            use=admit.session,
            shown=shown_by(bound) if bound else (),
            positions=admit.positions,
            program=None if admit.program is None else Holder("program", admit.program.owner, salt, admit.program.id),
            scored=admit.scored_after if asks else NEVER,
        )

    @property
    def pools(self) -> bool:
        """Whether a vector is asked for: its prompt is computed whole, in one step, without pages."""
        return self.limit == self.prompt_len

    def key(self, first: int, end: int) -> bytes:
        """What the tree knows the tokens `first` .. `end` - 1 by: tokens of the reply by their ids."""
        if not self.keys:
            return self.ids[first:end].tobytes()
        known = self.keys[first:end]
        return (known + self.ids[first + len(known) : end]).tobytes()

    def reusable(self, page_size: int) -> bytes:
        """The key of the pages that a cache hit may give. One token at least is computed, to sample from, and all from
        the first on whose successor is to be scored."""
        return self.key(0, min(len(self.ids) - 1, self.scored) // page_size * page_size)

    @property
    def numbers(self) -> frozenset[int]:
        """Of the media that it shows."""
        return frozenset(shown.number for shown in self.shown)

    def slot_admit(self) -> SlotAdmit:
        """What the device is told of it when it gets its slot."""
        return SlotAdmit(
            slot=self.slot,
            ids=self.ids.tobytes(),
            sampling=self.sampling,
            prompt_len=self.prompt_len,
            scored=min(self.scored, self.prompt_len),
            bound=self.bound,
            limit=self.limit,
            positions=self.positions,
            state=array("i", self.state).tobytes(),
        )

    def scores_in(self, start: int, end: int) -> bool:
        """Whether a chunk of these positions yields log-probabilities of the prompt that are not known yet."""
        return max(start, self.scored) < min(end, self.prompt_len - 1)

    def add_scores(self, scores: Logprobs) -> None:
        """Keep the log-probabilities of the next prompt positions."""
        self.scores.append(scores)
        self.scored += len(scores.ranks) // 4
        if self.scored == self.prompt_len - 1:
            self.scored = NEVER

    def leave(self) -> None:
        """Forget the place on the device; what was computed for it is to be found in the cache or done again."""
        self.slot, self.since = -1, NEVER
        self.node, self.shared, self.told, self.pages = None, 0, 0, []
        self.computed = 0
        self.session = None
        self.state, self.marks, self.kept, self.keeps, self.leaf, self.untold = [], [], 0, None, None, []


def rank(request: Request) -> tuple[int, int]:
    """Sorts higher priority first, then earlier arrival."""
    return (-request.priority, request.arrival)
