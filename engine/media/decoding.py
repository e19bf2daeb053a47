"""From bytes to Frames, with Pillow and PyAV, as the processors of transformers load images and video.

| what | as `transformers.image_utils.load_image` and `video_utils.read_video_pyav` do |
|---|---|
| EXIF orientation | applied |
| alpha, palettes, CMYK, one bit, grey | Pillow's conversion to RGB: alpha is dropped, not blended |
| animated images | the first frame |
| 16 bits a channel in colour | the upper 8 |
| 16 or 32 bits of grey, floating point | refused: Pillow cuts them off at 255 |
| frames of a video | by number, at the average rate, whatever their own times are; a rotation is not applied |

Sizes are read from the header and checked before a pixel is decoded. The frames of a video are as many as its header
says, or as it has packets where that says nothing; a file with fewer is refused. Runs in a process that may be killed:
anything here may take forever. Left out: sound, and which frames are chosen.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from engine.errors import RequestError, counted, shortened
from engine.media.frames import Frames

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

READERS = (  # no others are asked: some of Pillow's start programs
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    AvifImagePlugin.AvifImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
)
FORMATS = tuple(reader.format for reader in READERS if reader.format in Image.OPEN)
TOO_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,ogg,flv,asf"  # none that names other files
Choose = Callable[[int, float, float], list[int]]


def invalid(message: str) -> RequestError:
    """The error of what is no image or no video. Messages here follow the place of the part: "… cannot be read"."""
    return RequestError(message, code="invalid_media")


def too_large(message: str) -> RequestError:
    """The error of what is beyond a bound."""
    return RequestError(message, code="media_too_large")


def image_frames(source: bytes, content: bytes, most: int) -> Frames:
    """The one frame of the image in `source`, whose SHA-256 is `content`; of `most` pixels at most."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, which are checked here, and about odd metadata
        try:
            pixels = _image(source, most)
        except UnidentifiedImageError:
            raise invalid(f"is no image that can be read; send one of {', '.join(FORMATS)}") from None
        except (RequestError, MemoryError):
            raise
        except Exception as error:  # Pillow's readers raise many kinds for bytes that are not what they say
            raise invalid(f"cannot be read as an image ({_said(error)}); send it whole, or in another format") from None
    return Frames(pixels[None], (), hashlib.sha256(b"image" + content).digest())


def _image(source: bytes, most: int) -> "np.ndarray":
    """uint8 [height, width, 3]."""
    Image.MAX_IMAGE_PIXELS = None  # the bound is ours
    with Image.open(io.BytesIO(source), formats=FORMATS) as image:
        _check_size(image.width, image.height, most)
        if image.mode in TOO_DEEP:
            raise invalid(
                f"has pixels of more than 8 bits (Pillow's mode {image.mode}), of which nobody says what is white; "
                "send 8 bits a channel"
            )
        turned = ImageOps.exif_transpose(image)
        assert turned is not None, "it is a copy unless made in place"
        return np.asarray(turned.convert("RGB"))


def _check_size(width: int, height: int, most: int) -> None:
    if width < 1 or height < 1:
        raise invalid(f"is {width} × {height} pixels; send at least one")
    if width * height > most:
        raise too_large(
            f"is {width} × {height} = {width * height} pixels, and at most {most} are taken (--media-pixels); send it "
            "smaller"
        )


def video_frames(source: bytes, content: bytes, choose: Choose, most: int, most_together: int) -> Frames:
    """The frames of the video in `source` that `choose` takes of count, frames a second and seconds; each of `most`
    pixels at most, and all of `most_together`."""
    try:
        return _video(source, content, choose, most, most_together)
    except (RequestError, MemoryError, AssertionError):
        raise
    except Exception as error:  # as many kinds as there are formats
        raise invalid(f"cannot be read as a video ({_said(error)}); send it whole, or in another format") from None


def _video(source: bytes, content: bytes, choose: Choose, most: int, most_together: int) -> Frames:
    with _opened(source) as container:
        stream = _stream(container)
        width, height = stream.width, stream.height
        _check_size(width, height, most)
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate or Fraction(1)
    if not 0 < count <= len(source):
        raise invalid(
            f"has {counted(count, 'frame')} in {counted(len(source), 'byte')}, as it says itself; send another file"
        )
    fps = float(rate)
    chosen = choose(count, fps, count / fps)
    assert chosen and 0 <= min(chosen) <= max(chosen) < count, f"the processor chose frames {chosen} of {count}"
    if len(chosen) * width * height > most_together:
        raise too_large(
            f"has {counted(len(chosen), 'frame')} to look at of {width} × {height} = {width * height} pixels, and all "
            f"together may have {most_together} (--media-video-pixels); send it smaller, or shorter"
        )
    decoded = _decoded(source, frozenset(chosen), count, (width, height))
    chosen = [index for index in chosen if index in decoded]
    digest = hashlib.sha256(b"video" + content + np.asarray(chosen, "<i8").tobytes()).digest()
    times = tuple(index / fps for index in chosen)
    return Frames(np.stack([decoded[index] for index in chosen]), times, digest, count / fps)


def _decoded(source: bytes, chosen: frozenset[int], count: int, size: tuple[int, int]) -> dict[int, "np.ndarray"]:
    """The frames with those indices. Of a whole file some of the `count` frames may not be for showing; then they are
    missing, at the end."""
    found: dict[int, np.ndarray] = {}
    index = packets = 0
    with _opened(source) as container:
        for packet in container.demux(_stream(container)):
            packets += packet.size > 0
            for frame in packet.decode():
                if (frame.width, frame.height) != size:
                    raise invalid(
                        f"changes its size from {size[0]} × {size[1]} to {frame.width} × {frame.height} pixels at "
                        f"frame {index}; send it in one size"
                    )
                if index in chosen:
                    found[index] = frame.to_ndarray(format="rgb24")
                index += 1
                if len(found) == len(chosen):
                    return found
    if packets < count or not found:
        raise invalid(f"ends in the middle: of {counted(count, 'frame')} {index} can be decoded; send it whole")
    return found


def _opened(source: bytes) -> "InputContainer":
    """The container in `source`, which may not name other files or addresses."""
    import av  # here: for images it need not be installed

    return av.open(
        io.BytesIO(source),
        "r",
        options={"format_whitelist": CONTAINERS},
        io_open=_refuse_to_open,
        metadata_errors="replace",
    )


def _refuse_to_open(url: str, *_: Any) -> Any:
    raise invalid(f"names another file, {shortened(url)!r}; send one file that holds all")


def _stream(container: "InputContainer") -> "VideoStream":
    if not container.streams.video:
        raise invalid("has no pictures in it; send a video")
    return container.streams.video[0]


def _said(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {error}".rstrip(": "), 200)
