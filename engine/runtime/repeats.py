"""What requests bring along again crosses to the core's process once.

    Admit(picture, 9 MB), Admit(the same), … ──Spared──> 9 MB, 0, … ──Restored──> Admit(picture), Admit(the same), …

The requests that score the options of one question show the same pictures, and so do several replies to one prompt, and
those of one conversation, between which others come. A payload that another request brought along not long ago is left
out, and put back at the other end of the channel. Both ends remember what the last request with any brought along, and
what came before that up to a bound. Both see the same messages in the same order, so they agree on what that is. The
core keeps most of it anyway, for the device (engine/sched/assets.py). Left out: to ask for what is forgotten.
"""

from collections import OrderedDict
from typing import TypeVar

import msgspec

from engine.messages.assets import Need
from engine.messages.request import Admit

MOST = 32 << 20  # bytes of payloads that are remembered, unless the last request has more
Key = tuple[str, bytes]  # kind and content
T = TypeVar("T")


def _key(need: Need) -> Key:
    return need.kind, need.content


class Recent:
    """The sizes of the payloads that came last, in bytes. `put` says which are forgotten."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[Key, int] = OrderedDict()  # the last one is the last
        self._total = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._sizes

    def put(self, came: dict[Key, int]) -> list[Key]:
        """A request has brought these along; or is given what is remembered: such a size is 0."""
        for key, size in came.items():
            known = self._sizes.pop(key, 0)
            self._sizes[key] = size or known
            self._total += self._sizes[key] - known
        gone = []
        while self._total > MOST and len(self._sizes) > len(came):
            key, size = self._sizes.popitem(last=False)
            self._total -= size
            gone.append(key)
        return gone


class Spared:
    """The end that sends: each message is asked for once, just before it is sent."""

    def __init__(self) -> None:
        self._recent = Recent()

    def __call__(self, message: T) -> T | Admit:
        """`message` as it is to be sent."""
        if not isinstance(message, Admit) or not message.needs:
            return message
        known = [_key(need) in self._recent for need in message.needs]
        pairs = list(zip(message.needs, known, strict=True))
        # what is known has the size that was sent, whatever it has by now: both ends have to count alike
        if came := {_key(need): 0 if has else len(need.payload) for need, has in pairs if has or need.payload}:
            self._recent.put(came)
        return _with(message, [b"" if has else need.payload for need, has in pairs])


class Restored:
    """The end that receives: each message is given to it, in order."""

    def __init__(self) -> None:
        self._recent = Recent()
        self._came: dict[Key, bytes] = {}

    def __call__(self, message: T) -> T | Admit:
        """`message` as it was before it was `Spared`."""
        if not isinstance(message, Admit) or not message.needs:
            return message
        payloads = [need.payload or self._came.get(_key(need), b"") for need in message.needs]
        pairs = zip(message.needs, payloads, strict=True)
        came = {_key(need): payload for need, payload in pairs if payload}
        self._came |= came
        for key in self._recent.put({key: len(payload) for key, payload in came.items()}) if came else ():
            del self._came[key]
        return _with(message, payloads)


def _with(admit: Admit, payloads: list[bytes]) -> Admit:
    needs = zip(admit.needs, payloads, strict=True)
    return msgspec.structs.replace(
        admit, needs=tuple([msgspec.structs.replace(need, payload=payload) for need, payload in needs])
    )
