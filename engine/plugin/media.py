"""What processors of media are written with. Imports no torch."""

from engine.conversation.media import Encode, MediaProcessor, Piece, Placed, grow
from engine.media.frames import Frames
from engine.messages.media import Pixels, Prepared, packed

__all__ = ["Encode", "Frames", "MediaProcessor", "Piece", "Pixels", "Placed", "Prepared", "grow", "packed"]
