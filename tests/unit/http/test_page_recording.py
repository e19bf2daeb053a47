"""The recording of the page: what the docs show, and how frames become a GIF."""

import io
from pathlib import Path

from PIL import Image, ImageDraw

from bench.http.recording import HEIGHT, LONGEST, WIDTH, assembled

RECORDED = Path(__file__).parents[3] / "docs/page/recording.gif"
MOST_BYTES = 2_000_000


def frames_of(data: bytes) -> list[tuple[float, Image.Image]]:
    """The milliseconds of each frame, and its picture."""
    with Image.open(io.BytesIO(data)) as gif:
        found = []
        for number in range(getattr(gif, "n_frames", 1)):
            gif.seek(number)
            found.append((gif.info["duration"], gif.convert("RGB")))
        return found


def test_the_recording_of_the_docs_is_half_a_minute_and_small() -> None:
    data = RECORDED.read_bytes()
    frames = frames_of(data)
    assert len(data) < MOST_BYTES
    assert 20_000 < sum(milliseconds for milliseconds, _ in frames) <= 40_000 and len(frames) > 40
    assert frames[0][1].size == (WIDTH, HEIGHT)
    for _, image in frames[::10]:  # none is empty
        assert max(count for count, _ in image.getcolors(WIDTH * HEIGHT) or []) < 0.98 * WIDTH * HEIGHT


def test_frames_stay_until_the_next_one_and_of_equal_ones_one_is_kept() -> None:
    taken = []
    for at, width in ((0.0, 10), (0.25, 40), (0.5, 40), (3.0, 70)):
        image = Image.new("RGB", (100, 60), (250, 250, 250))
        ImageDraw.Draw(image).rectangle((0, 20, width, 40), (30, 90, 170))
        held = io.BytesIO()
        image.save(held, "PNG")
        taken.append((at, held.getvalue()))
    frames = frames_of(assembled(taken))
    assert [milliseconds for milliseconds, _ in frames] == [250, 250 + 1000 * LONGEST, 1000 * LONGEST]
    for (_, image), width in zip(frames, (10, 40, 70), strict=True):
        assert [image.getpixel((x, 30)) for x in (width, width + 1)] == [(30, 90, 170), (250, 250, 250)]
