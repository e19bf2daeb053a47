"""Media on their way to a device: what a picture or a clip is there, and how a request uses it.

The waiting room carries `Pixels` as the payload of a need of the kind MEDIA, and `MediaUse` as its use. The scheduler
reads the use alone; the device reads both.
"""

import msgspec

from engine.messages.assets import Bound, Need
from engine.messages.base import Part

MEDIA = "media"  # the kind of need


class Pixels(Part, frozen=True):
    """What a vision tower takes: uint8 numbers of `shape`, of which the model knows the order of dimensions.

    A number x of channel c means (x * scale - mean[c]) / std[c]. `grid` says how they lie, in the model's terms."""

    data: bytes
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class MediaUse(Part, frozen=True):
    """Where a request's prompt shows a medium: `spans` of its `tokens` embeddings, in their order, each with the
    position of its first and how many it has. Of `whole` ones no step computes a part, because their tokens see each
    other. At least `together` embeddings have to be made at a time: one step of a clip's grid."""

    spans: tuple[tuple[int, int], ...]
    tokens: int
    whole: bool = False
    together: int = 0


class Prepared(Part, frozen=True):
    """A medium as a model takes it: `tokens` embeddings will come of the `payload` (Pixels, packed).

    `digest` is the hash of the frames and of all that the processor did with them. `kind` is "image" or "video".
    `times` are the seconds of each step of a clip's grid; steps lie `interval` seconds apart. At least `together`
    embeddings have to be made at a time; 0 are all."""

    payload: bytes
    grid: tuple[int, ...]
    tokens: int
    digest: bytes
    kind: str = "image"
    times: tuple[float, ...] = ()
    interval: float = 0.0
    together: int = 0


def packed(pixels: Pixels) -> bytes:
    """The payload of a Prepared."""
    return msgspec.msgpack.encode(pixels)


def unpacked(payload: bytes) -> Pixels:
    return msgspec.msgpack.decode(payload, type=Pixels)


def media_need(medium: Prepared, use: MediaUse) -> Need:
    """What a request that shows `medium` waits for."""
    return Need(MEDIA, medium.digest, msgspec.msgpack.encode(use), medium.payload)


def media_use(bound: Bound) -> MediaUse:
    return msgspec.msgpack.decode(bound.use, type=MediaUse)
