"""What processors of media are written with. Imports no torch."""

from engine.cache.keys import media_keys
from engine.conversation.media import Encode, MediaProcessor, Piece, Placed, check_places, grow, keys_of
from engine.media.frames import Frames
from engine.messages.media import Pixels, Prepared, Slice, packed, slice_of, sliced

__all__ = [
    "Encode",
    "Frames",
    "MediaProcessor",
    "Piece",
    "Pixels",
    "Placed",
    "Prepared",
    "Slice",
    "check_places",
    "grow",
    "keys_of",
    "media_keys",
    "packed",
    "slice_of",
    "sliced",
]
