"""Media on their way to a device: what a picture or a clip is there, and how a request uses it.

    clip ── slices, which the tower encodes apart ──> a need for each content: Pixels, and where the prompt shows it

Behind the processor the slice is the unit: it is known by its own content, so it is loaded, encoded and kept once,
whatever it is a part of. The waiting room carries `Pixels` as the payload of a need of the kind MEDIA, and `MediaUse`
as its use. The scheduler reads the use alone; the device reads both.
"""

import hashlib
from collections.abc import Sequence

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
    """Where a request's prompt shows a slice: `spans` of its `tokens` embeddings, in their order, each with the
    position of its first and how many it has. Behind the last embedding a slice that is shown again begins anew. Of
    `whole` ones no step computes a part, because their tokens see each other."""

    spans: tuple[tuple[int, int], ...]
    tokens: int
    whole: bool = False


class Slice(Part, frozen=True):
    """A part of a medium that its tower encodes apart from all others: a picture, a frame of a clip, a pair of frames.

    `tokens` embeddings will come of the `payload` (Pixels, packed). `digest` is the hash of all that they follow from.
    The keys of its tokens (cache/keys.py) come of `key`; where that is empty, of the digest. A processor has to say a
    key where the positions of these tokens do not follow from the keys before them and from the digest."""

    payload: bytes
    tokens: int
    digest: bytes
    key: bytes = b""


class Prepared(Part, frozen=True):
    """A medium as a model takes it: `tokens` embeddings will come of the `payload` (Pixels, packed).

    `digest` is the hash of the frames and of all that the processor did with them. `kind` is "image" or "video".
    `times` are the seconds of each step of a clip's grid; steps lie `interval` seconds apart. A medium of several
    `slices` has its payload there (see `sliced`); any other is one slice itself."""

    payload: bytes
    grid: tuple[int, ...]
    tokens: int
    digest: bytes
    kind: str = "image"
    times: tuple[float, ...] = ()
    interval: float = 0.0
    slices: tuple[Slice, ...] = ()


def packed(pixels: Pixels) -> bytes:
    """The payload of a Prepared."""
    return msgspec.msgpack.encode(pixels)


def unpacked(payload: bytes) -> Pixels:
    return msgspec.msgpack.decode(payload, type=Pixels)


def slice_of(pixels: Pixels, tokens: int, place: bytes = b"") -> Slice:
    """A slice that is known by its pixels. `place` says what else the keys of its tokens come of."""
    payload = packed(pixels)
    digest = hashlib.sha256(payload).digest()
    return Slice(payload, tokens, digest, digest + place if place else b"")


def sliced(
    slices: Sequence[Slice],
    grid: tuple[int, ...],
    kind: str = "image",
    times: tuple[float, ...] = (),
    interval: float = 0.0,
) -> Prepared:
    """The medium that consists of `slices`, one or more."""
    first, *others = slices
    if not others and not first.key:
        return Prepared(first.payload, grid, first.tokens, first.digest, kind, times, interval)
    digest = hashlib.sha256(b"".join(each.key or each.digest for each in slices)).digest()
    return Prepared(b"", grid, sum([each.tokens for each in slices]), digest, kind, times, interval, tuple(slices))


def slices_of(medium: Prepared) -> tuple[Slice, ...]:
    """The parts of `medium` that are encoded apart, in their order."""
    return medium.slices or (Slice(medium.payload, medium.tokens, medium.digest),)


def size_of(medium: Prepared) -> int:
    """Bytes of the pixels of `medium`."""
    return sum([len(each.payload) for each in slices_of(medium)])


def media_need(shown: Slice, use: MediaUse) -> Need:
    """What a request that shows a slice waits for."""
    return Need(MEDIA, shown.digest, msgspec.msgpack.encode(use), shown.payload)


def media_use(bound: Bound) -> MediaUse:
    return msgspec.msgpack.decode(bound.use, type=MediaUse)
