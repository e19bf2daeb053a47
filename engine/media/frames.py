"""What is seen of a picture or a clip once it is decoded, and before a model's processor makes its pixels of it."""

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:  # fronts import this, and have no other need of numpy
    import numpy as np
    from numpy.typing import NDArray


class Frames(Struct, frozen=True):
    """A picture, or the frames of a clip that a model is to see.

    `pixels` are uint8 [n, height, width, 3], RGB, upright and without alpha; a picture has one frame. `times` are the
    seconds of each frame of a clip, none of a picture. `digest` (32 bytes) is the hash of the source and of what was
    done to it: what has the same digest is the same medium. `duration` are the seconds of the whole clip, 0 where
    nobody knows them. A picture that is `coarse` is to take few tokens: its client said `detail` "low"."""

    pixels: "NDArray[np.uint8]"
    times: tuple[float, ...]
    digest: bytes
    duration: float = 0.0
    coarse: bool = False
