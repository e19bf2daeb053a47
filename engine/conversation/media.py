"""Where the media of a conversation meet a model: refused, or put in place by the model's processor.

No model here has a processor yet, so `Text` has none and every picture is refused. What fetches, decodes and encodes
media will stand behind this face.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

from engine.conversation.parts import Image, Message, Video, media_of
from engine.errors import RequestError

Runs = Sequence[tuple[int, "array[int]"]]  # keys by the index that they begin at, as keys_with has them


class MediaProcessor(Protocol):
    """What one model makes of media, up to their tokens."""

    def placed(self, ids: list[int], media: Sequence[Image | Video], /) -> tuple[list[int], Runs]:
        """The ids of a prompt, in which each placeholder of the chat template's has become as many as its medium takes,
        and the keys of those (cache/keys.py). `media` are in the order of the placeholders."""
        ...


def readable(messages: Sequence[Message], processor: MediaProcessor | None) -> list[Image | Video]:
    """The media of `messages`. Raises RequestError for the first where the model has no `processor`."""
    media = media_of(messages)
    if media and processor is None:
        first = media[0]
        raise RequestError(
            f"{first.place}.type is {first.kind!r}, and the model reads text alone; send text, or ask a model that "
            "reads it",
            param=f"{first.place}.type",
            code="unsupported_parameter",
        )
    return media
