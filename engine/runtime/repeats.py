"""What several requests in a row bring along crosses to the core's process once.

    Admit(picture, 9 MB), Admit(the same), … ──Spared──> 9 MB, 0, … ──Restored──> Admit(picture), Admit(the same), …

The requests that score the options of one question show the same pictures, and so do several replies to one prompt. A
payload that the request before brought along too is left out, and put back at the other end of the channel, which
remembers those of the last request that had any. Both ends see the same messages in the same order, so they agree on
what that is. Left out: requests that others come between, which cost one more payload.
"""

from typing import TypeVar

import msgspec

from engine.messages.assets import Need
from engine.messages.request import Admit

Key = tuple[str, bytes]  # kind and content
T = TypeVar("T")


def _key(need: Need) -> Key:
    return need.kind, need.content


class Spared:
    """The end that sends: each message is asked for once, just before it is sent."""

    def __init__(self) -> None:
        self._sent: frozenset[Key] = frozenset()

    def __call__(self, message: T) -> T | Admit:
        """`message` as it is to be sent."""
        if not isinstance(message, Admit) or not any(need.payload for need in message.needs):
            return message
        sent, self._sent = self._sent, frozenset(_key(need) for need in message.needs if need.payload)
        return _with(message, [b"" if _key(need) in sent else need.payload for need in message.needs])


class Restored:
    """The end that receives: each message is given to it, in order."""

    def __init__(self) -> None:
        self._came: dict[Key, bytes] = {}

    def __call__(self, message: T) -> T | Admit:
        """`message` as it was before it was `Spared`."""
        if not isinstance(message, Admit) or not message.needs:
            return message
        payloads = [need.payload or self._came.get(_key(need), b"") for need in message.needs]
        pairs = zip(message.needs, payloads, strict=True)
        self._came = {_key(need): payload for need, payload in pairs if payload} or self._came
        return _with(message, payloads)


def _with(admit: Admit, payloads: list[bytes]) -> Admit:
    needs = zip(admit.needs, payloads, strict=True)
    return msgspec.structs.replace(
        admit, needs=tuple([msgspec.structs.replace(need, payload=payload) for need, payload in needs])
    )
