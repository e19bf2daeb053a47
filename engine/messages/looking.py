"""What a page or a terminal shows of a running engine: one snapshot, made only where somebody asks for it."""

from engine.messages.base import Message, Part
from engine.messages.control import CopyStats

HEAD = 16  # keys of a prefix that are told


class Look(Message, frozen=True):
    """http → scheduler: what is going on? The Answer's value is a Snapshot. Whoever asks soon after gets the same."""

    number: int


class RowsLook(Part, frozen=True):
    """Requests that have a slot, at most MOST_ROWS of them (sched/looking.py), as int32 columns: the slot, the phase (0
    its prompt is computed, 1 it decodes, 2 its last token or its vector is on the way), the tokens of its prompt, those
    of them that the cache had, those that are computed, those of its reply, and the pages that it holds."""

    slots: bytes
    phases: bytes
    prompts: bytes
    cached: bytes
    computed: bytes
    replies: bytes
    pages: bytes


class StepsLook(Part, frozen=True):
    """The last steps, oldest first, whose last number is `last`: seconds on the device and idle ones before (float32),
    rows and tokens (int32)."""

    last: int
    seconds: bytes
    idle: bytes
    rows: bytes
    tokens: bytes


class PagesLook(Part, frozen=True):
    """The pages by number, a letter for `each` of them, of the owner that most have; cache/maps.py has the letters.
    None if there are too many pages to look at."""

    each: int
    owners: str


class TierLook(Part, frozen=True):
    """A tier below the device, "host" or "store": it has room for so many pages, 0 if that is not known, and holds
    `used`."""

    tier: str
    pages: int
    used: int
    map: PagesLook


class TreeLook(Part, frozen=True):
    """Nodes of the radix tree, parents first, as int32 columns: the parent's place here or -1, pages, locks, children
    that are not told, and the first HEAD keys of each [nodes, HEAD], -1 after their end and for all of a salted one."""

    parents: bytes
    pages: bytes
    locks: bytes
    hidden: bytes
    heads: bytes


class ChannelLook(Part, frozen=True):
    """Messages that wait for an actor, of `capacity` at most; 0 where admission bounds them."""

    actor: str
    waiting: int
    capacity: int = 0


class AssetsLook(Part, frozen=True):
    """How many things of a kind, such as grammars, are in a state of the waiting room."""

    kind: str
    state: str
    count: int


class Snapshot(Part, frozen=True):
    """The `number`-th one, which took the scheduler so many `seconds`. `counts` are figures of Stats; `queue` (int32)
    are the lengths of the prompts that wait, the first ones. Of copies of attention, rows, pages, trees and tiers
    follow each other. Where there are tiers, `ceiling` is the share of prompts that a cache without end would have."""

    number: int
    seconds: float
    worker: str
    cause: str
    paused: bool
    counts: dict[str, int]
    copies: tuple[CopyStats, ...]
    rows: RowsLook
    queue: bytes
    steps: StepsLook
    pages: PagesLook
    tree: TreeLook
    channels: tuple[ChannelLook, ...]
    assets: tuple[AssetsLook, ...]
    tiers: tuple[TierLook, ...] = ()
    ceiling: float = 0.0
