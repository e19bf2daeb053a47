"""A model that sees, without a model: a processor of media over the echo model's text, and pictures to show it.

For its chat template an image is a `*` and a clip a `#`. An image takes a token for each 32 × 32 pixels or part of
them, or one if it is coarse, a clip two for each frame."""

import hashlib
import io
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from engine.conversation.media import Piece, Placed, grow
from engine.media.frames import Frames
from engine.messages.media import Prepared
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.text.tokenizer import Text

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '*' if part.type == 'image' else '#' }}{% endfor %}{% endif %}"
    "{% endfor %}"
)
PLACES = {ord("*"): "image", ord("#"): "video"}
DEADLY, SLOW, FAULTY, HUGE, WRONG = 13, 17, 19, 23, 29  # widths of pictures of which it dies, and so on


class FakeMedia:
    """Sees every other frame of a clip."""

    def __init__(self) -> None:
        self.encode = lambda text: list(text.encode())  # as those have that write texts beside media; no pickle

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        return list(range(0, count, 2))

    def prepare(self, frames: Frames, /) -> Prepared:
        count, height, width, _ = frames.pixels.shape
        match width:
            case 13:  # DEADLY
                os._exit(3)
            case 17:  # SLOW
                time.sleep(60)
            case 19:  # FAULTY
                np.zeros(1 << 45, np.uint8)
            case 29:  # WRONG
                raise ZeroDivisionError("a bug of its own")
        kind = "video" if frames.times else "image"
        tokens = 2 * count if frames.times else 1 if frames.coarse else -(-height // 32) * -(-width // 32)
        digest = hashlib.sha256(b"fake %d" % tokens + frames.digest).digest()
        payload = bytes(1 << 28) if width == HUGE else frames.pixels.tobytes()
        return Prepared(payload, (count, height, width), tokens, digest, kind, frames.times)

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        return grow(ids, media, PLACES, lambda medium: [Piece([1], medium.tokens)])


@cache
def seeing_text() -> Text:
    """The echo model's text, with a processor."""
    return Text(open_checkpoint(Plugins.load(()), "echo").text(), TEMPLATE, media=FakeMedia())


def start(errors: int | None = None) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """A media process that can import this module; what it writes for people goes to the descriptor `errors`."""
    ours, theirs = socket.socketpair()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "engine.media.process", str(theirs.fileno())]
    with theirs:
        return ours, subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path}, stderr=errors
        )


# ── pictures and clips ───────────────────────────────────────────────────────────────────────


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file that holds `image`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(width: int = 64, height: int = 48, shade: int = 0) -> Image.Image:
    """A picture in which no two columns are alike."""
    columns = np.arange(width, dtype=np.uint8)
    rows = np.arange(height, dtype=np.uint8)
    red, green = np.meshgrid(columns, rows)
    return Image.fromarray(np.stack([red, green, np.full_like(red, shade)], -1))


def png(width: int, height: int, depth: int, colours: int, rows: bytes) -> bytes:
    """A PNG whose header says so, whatever its rows are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BOMB = png(30_000, 30_000, 8, 2, b"\0" * 100)


@cache  # x264 may give other bytes for the same frames when the machine is busy
def clip(
    frames: int = 10, width: int = 64, height: int = 48, rate: int = 10, format: str = "mp4", codec: str = "libx264"
) -> bytes:
    """A clip whose frame i has the shade 10 i."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            shade = np.full((height, width, 3), 10 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
