"""What processors of media are written with. Imports no torch."""

from engine.cache.keys import media_keys
from engine.conversation.media import Encode, MediaProcessor, Piece, Placed, check_places, grow
from engine.media.frames import Frames
from engine.messages.media import Pixels, Prepared, packed

__all__ = [
    "Encode",
    "Frames",
    "MediaProcessor",
    "Piece",
    "Pixels",
    "Placed",
    "Prepared",
    "check_places",
    "grow",
    "media_keys",
    "packed",
]
