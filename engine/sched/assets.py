"""The waiting room: requests stay here until all that they need is on the device. Pure.

    admit ──Make──> maker ──Made──Load──> device ──Loaded──> requests that have all they need may run
                      └─ refused: all that wait are told; later ones are told at once if the refusal lasts

    making ──> made ──> loading ──> ready        a thing's life; a refusal that lasts is kept in its place
                 ^─────────┴──────────┘          when the device is lost; a need may bring what is made along

A request here holds no slot and no page. Things are told apart by kind and content: what is known already is not made
again. A lost device takes what it was loading for the first time with it, because that may be what it died of; the next
device loads all else. The oldest of a kind that no live request has is forgotten when there are too many, or when they
have too many bytes. Left out: a bound on what is in use.

A need for pages (messages/tiers.py) only shortens what a request computes. Nothing is made or loaded for it: once what
there is has come, or is not waited for any more, it is `settled`, and the request runs.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import msgspec

from engine.errors import RequestError
from engine.messages.assets import Bound, Drop, Load, Loaded, Made, Make, Need
from engine.messages.request import Admit
from engine.messages.tiers import PAGES
from engine.sched.limits import rid_in_use

Key = tuple[str, bytes]  # kind and content
State = Literal["making", "made", "loading", "ready", "refused"]
NO_BOUNDS: Mapping[str, int] = MappingProxyType({})
BESIDE = 1024  # bytes that a thing takes here and on the device beside its payload


@dataclass(slots=True, eq=False)
class Asset:
    """One thing. `proved` says that a device has loaded it before; `waiting` are all requests here that need it."""

    kind: str
    content: bytes
    number: int
    state: State = "making"
    payload: bytes = b""
    proved: bool = False
    refusal: RequestError | None = None
    waiting: "dict[str, Waiting]" = field(default_factory=dict)  # by rid

    @property
    def idle(self) -> bool:
        """Whether it may be forgotten, if no request that has left this room uses it."""
        return not self.waiting and self.state in ("made", "ready", "refused")


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits, and its things in the order of its needs."""

    admit: Admit
    arrival: int
    assets: list[Asset]

    @property
    def rank(self) -> tuple[int, int]:
        return (-self.admit.priority, self.arrival)

    @property
    def complete(self) -> bool:
        return all(asset.state == "ready" for asset in reversed(self.assets))  # they are loaded in order

    def bound(self) -> tuple[Bound, ...]:
        pairs = zip(self.admit.needs, self.assets, strict=True)
        return tuple(Bound(need.kind, asset.number, need.use) for need, asset in pairs if need.kind != PAGES)


def without_payloads(admit: Admit) -> Admit:
    """`admit`, whose things have what it brought along: with many requests for one thing, each brings it."""
    if not any(need.payload for need in admit.needs):
        return admit
    needs = [msgspec.structs.replace(need, payload=b"") for need in admit.needs]
    return msgspec.structs.replace(admit, needs=tuple(needs))


@dataclass(slots=True)
class Due:
    """What follows from an event. `ready` is in order: higher priority first, then earlier arrival."""

    makes: list[Make] = field(default_factory=list)
    device: list[Load | Drop] = field(default_factory=list)
    ready: list[tuple[Admit, tuple[Bound, ...]]] = field(default_factory=list)
    refused: list[tuple[str, RequestError]] = field(default_factory=list)  # by rid


class WaitingRoom:
    """Keeps at most `most[kind]` things that nobody uses, or of other kinds `most_bytes[kind]` bytes of them, each with
    BESIDE; none of a kind without a bound. No device is there before `started`."""

    def __init__(self, most: Mapping[str, int], most_bytes: Mapping[str, int] = NO_BOUNDS) -> None:
        self.grown = False  # something has come since `evict`, which is asked once for all slices of a clip
        self._most, self._most_bytes = most, most_bytes
        self._device = False
        self._numbers = itertools.count(1)
        self._arrivals = itertools.count()
        self._assets: OrderedDict[Key, Asset] = OrderedDict()  # the last one asked for is the last
        self._by_number: dict[int, Asset] = {}
        self._taken = Counter[str]()  # of a kind's bound, by all things of it
        self._underway: set[int] = set()  # numbers of what is being made or loaded
        self._requests: dict[str, Waiting] = {}  # by rid
        self._reloading: set[int] = set()  # numbers of what a device before this one had

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._requests)

    def states(self) -> Counter[tuple[str, str]]:
        """How many things of each kind are in each state."""
        return Counter((asset.kind, asset.state) for asset in self._assets.values())

    def rids(self) -> list[str]:
        """Those of the requests that wait."""
        return list(self._requests)

    def admit(self, admit: Admit) -> Due:
        """Let a request through if it needs nothing that is not there; else keep it until all is."""
        due = Due()
        if admit.rid in self._requests:
            due.refused.append((admit.rid, rid_in_use(admit.rid)))
            return due
        for need in admit.needs:
            known = self._assets.get((need.kind, need.content))
            if known is not None and known.refusal is not None:
                self._assets.move_to_end((need.kind, need.content))
                due.refused.append((admit.rid, known.refusal))
                return due
        assets = [self._asset(need, due) for need in admit.needs]
        request = Waiting(without_payloads(admit), next(self._arrivals), assets)
        if request.complete:
            due.ready.append((admit, request.bound()))
            return due
        self._requests[admit.rid] = request
        for asset in request.assets:
            asset.waiting[admit.rid] = request
        return due

    def _asset(self, need: Need, due: Due) -> Asset:
        """The thing that `need` asks for; one that is not known begins to be made, or to be loaded if it is made."""
        key = need.kind, need.content
        known = self._assets.get(key)
        if known is not None:
            self._assets.move_to_end(key)
            return known
        asset = self._assets[key] = Asset(need.kind, need.content, next(self._numbers))
        self._by_number[asset.number] = asset
        self._taken[asset.kind] += self._weight(asset)
        self._underway.add(asset.number)
        if need.payload:
            self._take(asset, need.payload, due)
        else:
            due.makes.append(Make(need.kind, asset.number, need.content))
        return asset

    def made(self, message: Made) -> Due:
        """A maker has answered."""
        self.grown = True
        asset, due = self._by_number[message.number], Due()
        assert asset.state == "making", f"{asset.kind} {asset.number} is {asset.state}, and was made again"
        if message.status:
            refusal = RequestError(
                message.cause, param=message.param or asset.kind, code=message.code, status=message.status
            )
            self._refuse(asset, refusal, due, lasting=message.lasting)
            return due
        self._take(asset, message.payload, due)
        return due

    def loaded(self, message: Loaded) -> Due:
        """A device has answered."""
        self.grown = True
        asset, due = self._by_number.get(message.number), Due()
        if asset is None:  # forgotten while the device was started again
            return due
        if message.cause:
            if not asset.proved:  # else rows that wait to run may still come with it
                due.device.append(Drop(asset.kind, asset.number))
            code = f"{asset.kind}_failed"
            self._refuse(asset, RequestError(message.cause, param=asset.kind, code=code, status=500), due)
            return due
        self._become(asset, "ready")
        asset.proved = True
        self._reloading.discard(asset.number)
        self._release(asset.waiting.values(), due)
        return due

    def settle(self, number: int) -> Due:
        """Those that waited for pages wait no longer."""
        due = Due()
        if (asset := self._by_number.get(number)) is not None:
            self._settle(asset, due)
        return due

    def abort(self, rid: str) -> bool:
        """Whether `rid` waited here. Its things are made ready all the same."""
        return self._leave(rid) is not None

    def lost(self) -> Due:
        """The device is gone. Who waits for something that it was loading for the first time is refused."""
        due = Due()
        self._device = False
        for asset in list(self._assets.values()):
            if asset.state == "loading" and not asset.proved:
                refusal = RequestError(
                    f"the device worker stopped while this request's {asset.kind} was loaded, and is being restarted; "
                    "send the request again",
                    code="worker_lost",
                    status=503,
                )
                self._refuse(asset, refusal, due)
            elif asset.kind == PAGES:
                self._settle(asset, due)
            elif asset.state in ("loading", "ready"):
                self._become(asset, "made")
        return due

    def started(self) -> Due:
        """A device is there: it loads all that is made."""
        due = Due()
        self._device = True
        for asset in self._assets.values():
            self._load(asset, due)
        return due

    def reloading(self, used: Callable[[], set[int]]) -> bool:
        """Whether a device that was started again is still to load what requests outside this room use."""
        return bool(self._reloading) and not self._reloading.isdisjoint(used())

    def evict(self, used: set[int]) -> list[Drop]:
        """Forget what is too much, but nothing that is `used` outside this room, waited for or under way."""
        self.grown = False
        bounds = {**self._most, **self._most_bytes}
        excess = {kind: taken - bounds.get(kind, 0) for kind, taken in self._taken.items()}
        if max(excess.values(), default=0) <= 0:
            return []
        busy = {asset.number for request in self._requests.values() for asset in request.assets}
        for number in busy | self._underway | used:
            if (asset := self._by_number.get(number)) is not None:
                excess[asset.kind] -= self._weight(asset)
        over = {kind for kind, much in excess.items() if much > 0}
        gone: list[Asset] = []
        for asset in self._assets.values():  # the oldest first, so that few are looked at
            if not over:
                break
            if asset.kind in over and asset.idle and asset.number not in used:
                gone.append(asset)
                excess[asset.kind] -= self._weight(asset)
                if excess[asset.kind] <= 0:
                    over.remove(asset.kind)
        for asset in gone:
            self._forget(asset)
        return [Drop(asset.kind, asset.number) for asset in gone if asset.state == "ready" and asset.kind != PAGES]

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _weight(self, asset: Asset) -> int:
        return BESIDE + len(asset.payload) if asset.kind in self._most_bytes else 1

    def _become(self, asset: Asset, state: State) -> None:
        asset.state = state
        (self._underway.add if state in ("making", "loading") else self._underway.discard)(asset.number)

    def _take(self, asset: Asset, payload: bytes, due: Due) -> None:
        """It is made."""
        self._taken[asset.kind] -= self._weight(asset)
        asset.payload = payload
        self._taken[asset.kind] += self._weight(asset)
        self._become(asset, "made")
        self._load(asset, due)

    def _load(self, asset: Asset, due: Due) -> None:
        if self._device and asset.state == "made":
            self._become(asset, "loading")
            if asset.proved:
                self._reloading.add(asset.number)
            due.device.append(Load(asset.kind, asset.number, asset.payload))

    def _release(self, requests: Iterable[Waiting], due: Due) -> None:
        """Let those go that have all they need."""
        for request in sorted((each for each in requests if each.complete), key=lambda request: request.rank):
            self._leave(request.admit.rid)
            due.ready.append((request.admit, request.bound()))

    def _settle(self, asset: Asset, due: Due) -> None:
        self._become(asset, "ready")
        self._release(asset.waiting.values(), due)
        if not asset.waiting:  # else by `evict`, once the request has all else that it waits for
            self._forget(asset)

    def _refuse(self, asset: Asset, refusal: RequestError, due: Due, *, lasting: bool = False) -> None:
        """Tell all that wait for `asset`. A refusal that is `lasting` is kept for those to come."""
        for rid in list(asset.waiting):
            self._leave(rid)
            due.refused.append((rid, refusal))
        self._become(asset, "refused")
        asset.refusal = refusal
        if not lasting:
            self._forget(asset)

    def _leave(self, rid: str) -> Waiting | None:
        request = self._requests.pop(rid, None)
        if request is not None:
            for asset in request.assets:
                asset.waiting.pop(rid, None)
        return request

    def _forget(self, asset: Asset) -> None:
        del self._by_number[asset.number], self._assets[asset.kind, asset.content]
        self._reloading.discard(asset.number)
        self._underway.discard(asset.number)
        self._taken[asset.kind] -= self._weight(asset)

    def check_integrity(self) -> None:
        """Assert that requests and things fit together. For tests, and when idle."""
        assert {asset.number for asset in self._assets.values()} == self._by_number.keys()
        for rid, request in self._requests.items():
            assert not request.complete, f"{rid} waits for nothing"
            assert all(asset.waiting.get(rid) is request for asset in request.assets), f"nothing would wake {rid}"
            assert all(self._by_number.get(asset.number) is asset for asset in request.assets)
        for asset in self._assets.values():
            assert asset.waiting.keys() <= self._requests.keys(), f"{asset.kind} {asset.number} waits for who is gone"
            assert self._device or asset.state not in ("loading", "ready")
        underway = {asset.number for asset in self._assets.values() if asset.state in ("making", "loading")}
        assert underway == self._underway
        taken = Counter[str]()
        for asset in self._assets.values():
            taken[asset.kind] += self._weight(asset)
        assert taken == +self._taken, f"{dict(self._taken)} is said to be taken, and {dict(taken)} is"
