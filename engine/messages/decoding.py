"""Work for a process that decodes: bytes of an image or a video in, what the model's processor makes of them out."""

from collections.abc import Sequence
from typing import Literal

from engine.messages.base import Message
from engine.messages.media import Prepared

# Bytes of all media of a request. They travel in a frame (runtime/channel.py), beside 20 bytes for each of its tokens.
MOST_PAYLOAD = (1 << 28) - (32 << 20)


class MediaBoot(Message, frozen=True):
    """media pool → process: the first frame. `processor` is the model's, pickled; the bounds are those of the options,
    in pixels. `plugins` are those of the engine's own option, one of which may have the processor."""

    processor: bytes
    pixels: int
    video_pixels: int
    plugins: tuple[str, ...] = ()


class DecodeMedia(Message, frozen=True):
    """media pool → process: decode `source` and have the processor prepare it. `content` is the SHA-256 of it; `coarse`
    is as in Frames."""

    kind: Literal["image", "video"]
    content: bytes
    source: bytes
    coarse: bool = False


class MediaReady(Message, frozen=True):
    """process → media pool: the answer. `pixels` are those that were decoded; seconds are of the processor's time."""

    prepared: Prepared
    pixels: int
    decode_seconds: float
    prepare_seconds: float


def tokens_of(media: Sequence[Prepared]) -> tuple[int, int]:
    """How many tokens images among `media` take, and how many video does."""
    images = sum([medium.tokens for medium in media if medium.kind == "image"])
    return images, sum([medium.tokens for medium in media]) - images
