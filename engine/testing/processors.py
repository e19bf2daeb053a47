"""The contract of processors of media, for authors by way of engine.plugin.testing.

def test_my_processor():
    check_processor(MyProcessor, config, processor_config, image=IMAGE_ID, encode=tokenizer_encode)

Left out: whether pixels and positions are those that the model was trained with, for which one compares with its own
processor.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from engine.conversation.media import Encode, MediaProcessor, Placed, needs_of
from engine.errors import RequestError, counted
from engine.media.frames import Frames
from engine.messages.media import Pixels, Prepared, slices_of, unpacked
from engine.plugin.terms import Terms

USUAL = ((224, 224), (96, 128))  # height and width that every model takes
ODD = ((1, 1), (1, 64), (33, 47), (90, 14), (28, 1000), (301, 517))
CLIPS = ((48, 24.0), (33, 7.0), (500, 30.0))  # frames and frames a second
SHORT = ((1, 24.0), (2, 2.0), (3, 60.0))
Tower = Callable[[list[Pixels]], Sequence[Any]]


class _Asked:
    """A processor, of which each answer is looked at. None stands for a RequestError."""

    def __init__(self, processor: MediaProcessor) -> None:
        self.processor = processor

    def choose_frames(self, count: int, fps: float) -> list[int] | None:
        with _only_refuses(f"choose_frames of {count} frames") as refused:
            chosen = self.processor.choose_frames(count, fps, count / fps)
        if refused:
            return None
        right = all(type(each) is int and 0 <= each < count for each in chosen)
        assert chosen and right and all(first < last for first, last in pairwise(chosen)), (
            f"choose_frames of {count} frames gives {chosen}; it gives numbers below {count}, ascending, one or more"
        )
        return chosen

    def prepare(self, frames: Frames) -> Prepared | None:
        where, before = f"prepare of {frames.pixels.shape}", frames.pixels.copy()
        with _only_refuses(where) as refused:
            medium = self.processor.prepare(frames)
        assert (frames.pixels == before).all(), f"{where} writes into the frames"
        if refused:
            return None
        wanted = "video" if frames.times else "image"
        assert medium.kind == wanted, f"{where} has the kind {medium.kind!r}, and is of a {wanted}"
        counts = [each.tokens for each in slices_of(medium)]
        assert medium.tokens == sum(counts) and min(counts) > 0, (
            f"{where} has {medium.tokens} tokens, and slices of {counts}, each of which is to have one or more"
        )
        for each in slices_of(medium):
            pixels = unpacked(each.payload)
            size = int(np.prod(pixels.shape))
            assert len(pixels.data) == size, (
                f"{where} has {counted(len(pixels.data), 'byte')} of pixels of {pixels.shape}: {size}"
            )
            assert len(pixels.mean) == len(pixels.std) and all(pixels.std), (
                f"{where} is normalised with the mean {pixels.mean} and the deviation {pixels.std}"
            )
        return medium

    def placed(self, ids: list[int], media: Sequence[Prepared]) -> Placed | None:
        given = list(ids)
        with _only_refuses(f"placed of {len(media)} media in {ids}") as refused:
            placed = self.processor.placed(ids, media)
        assert ids == given, f"placed changes the ids that it is given: {given} became {ids}"
        return None if refused else placed


def check_processor(
    kind: type[MediaProcessor],
    config: Mapping[str, Any],
    described: Mapping[str, Any],
    *,
    image: int,
    video: int | None = None,
    encode: Encode | None = None,
    tower: Tower | None = None,
) -> None:
    """It makes the same of the same frames, tells apart what is encoded otherwise, and puts into a prompt as many
    embeddings as it has said.

    `config` is config.json, `described` what the checkpoint says of processors. `image` and `video` are the ids of the
    placeholders in a prompt; without `video` clips are to be refused. `tower` is the model's `encode`, which then has
    to make as many embeddings of each slice as the processor has said."""
    asked = _Asked(kind(Terms(config), Terms(described), encode))
    elsewhere = _Asked(pickle.loads(pickle.dumps(kind(Terms(config), Terms(described)))))
    seen = [frames for height, width in (*USUAL, *ODD) for frames in _pictures(height, width)]
    if video is None:
        chosen = asked.choose_frames(48, 24.0)
        assert chosen is None, f"choose_frames gives {chosen}; a processor without clips raises RequestError"
    else:
        seen += list(_clips(asked))
    prepared: list[Prepared] = []
    for frames in seen:
        medium = asked.prepare(frames)
        usual = frames.times or frames.pixels.shape[1:3] in USUAL
        assert medium is not None or not usual, f"prepare refuses frames of {frames.pixels.shape}"
        again = (asked.prepare(frames), elsewhere.prepare(frames))
        assert again == (medium, medium), (
            f"prepare of {frames.pixels.shape} differs from one call to the next, or in another process"
        )
        prepared += [] if medium is None else [medium]
    _check_digests(prepared)
    for size in (*USUAL, *ODD):
        full, coarse, _ = map(asked.prepare, _pictures(*size))
        assert full is None or coarse is None or coarse.tokens <= full.tokens, (
            f"a picture of {size} takes {full.tokens} tokens, and {coarse.tokens} where it is coarse"
        )
    _check_places(asked, prepared, {"image": image, "video": video})
    if tower is not None:
        _check_tower(tower, prepared)


def _clips(asked: _Asked) -> Iterator[Frames]:
    """The frames that are chosen of some clips."""
    for count, fps in (*CLIPS, *SHORT):
        chosen = asked.choose_frames(count, fps)
        assert chosen is not None or (count, fps) in SHORT, f"choose_frames refuses {count} frames, {fps} a second"
        if chosen is not None:
            times = tuple(each / fps for each in chosen[:12])
            yield _frames(len(times), 60, 100, count, times=times, duration=count / fps)


def _check_digests(prepared: Sequence[Prepared]) -> None:
    """What is encoded otherwise is known by another digest, whole and slice by slice."""
    for name, found in (
        ("media", [(each.digest, each) for each in prepared]),
        ("slices", [(each.digest, (each.payload, each.tokens)) for medium in prepared for each in slices_of(medium)]),
    ):
        known: dict[bytes, Any] = {}
        for digest, what in found:
            assert isinstance(digest, bytes) and len(digest) >= 16, f"a digest is {digest!r}; take one of 16 bytes up"
            assert known.setdefault(digest, what) == what, (
                f"two {name} with different pixels, grids or tokens have the digest {digest.hex()}; hash all that the "
                "embeddings follow from"
            )


def _check_places(asked: _Asked, prepared: Sequence[Prepared], ids: Mapping[str, Any]) -> None:
    """Prompts of one medium, of two, and of wrong numbers of them."""
    a, b, c = [each for each in range(1000, 2000) if each not in ids.values()][:3]
    alone = asked.placed([a, b], [])
    assert alone is not None and list(alone.ids) == [a, b] and not alone.spans, f"a text is placed as {alone}"
    keys: dict[bytes, list[int]] = {}
    for first, second in zip(prepared, [*prepared[1:], prepared[0]], strict=True):
        prompt = [a, ids[first.kind], b]
        one = asked.placed(prompt, [first])
        two = asked.placed([*prompt, ids[second.kind], c], [first, second])
        assert one is not None and two is not None, f"placed refuses as many media as there are places in {prompt}"
        for placed, media, end in ((one, [first], b), (two, [first, second], c)):
            own = _check_placed(placed, media)
            assert (placed.ids[0], placed.ids[-1]) == (a, end), f"the text around media is {placed.ids} in the end"
            for medium, its_keys in zip(media, own, strict=True):
                assert keys.setdefault(medium.digest, its_keys) == its_keys, "a medium's keys change with its prompt"
        assert list(two.ids[: len(one.ids)]) == list(one.ids), "what comes later changes the ids before it"
        later, before = _positions(two)[:, : len(one.ids)], _positions(one)
        assert (later == before).all(), "what comes later changes the positions before it"
        for wrong, media in (([a, b], [first]), (prompt, [first, second]), ([*prompt, *prompt], [first])):
            assert asked.placed(wrong, media) is None, f"placed puts {len(media)} media into {wrong}"
    distinct = {tuple(each) for each in keys.values()}
    assert len(distinct) == len(keys), f"{len(keys)} media have {len(distinct)} different runs of keys"


def _check_placed(placed: Placed, media: Sequence[Prepared]) -> list[list[int]]:
    """The keys of each medium."""
    counts, said = [[count for _, count in own] for own in placed.spans], [medium.tokens for medium in media]
    assert list(map(sum, counts)) == said, f"spans have room for {counts} embeddings, and the media have {said}"
    needs_of(media, placed)
    spans = [span for own in placed.spans for span in own]
    ends = [0, *(begin + count for begin, count in spans)]
    ordered = all(end <= begin for end, (begin, _) in zip(ends, spans, strict=False)) and ends[-1] <= len(placed.ids)
    assert ordered, f"spans {spans} overlap, or leave the {len(placed.ids)} ids"
    for begin, count in spans:
        assert len(set(placed.ids[begin : begin + count])) == 1, f"the ids of the span {(begin, count)} differ"
    key_at = {start + at: key for start, run in placed.runs for at, key in enumerate(run)}
    shown = [at for begin, count in spans for at in range(begin, begin + count)]
    assert sorted(key_at) == shown, (
        f"runs have keys for {counted(len(key_at), 'token')}, and spans have {counted(len(shown), 'token')}"
    )
    assert all(-(1 << 31) <= key < 0 for key in key_at.values()), "keys of media are negative numbers of 32 bits"
    text = np.setdiff1d(np.arange(len(placed.ids)), shown)
    time, height, width = _positions(placed)[:, text]
    assert (time == height).all() and (time == width).all() and (np.diff(time) > 0).all(), (
        f"the positions of text differ by axis, or do not ascend: {time.tolist()}"
    )
    return [[key_at[at] for begin, count in own for at in range(begin, begin + count)] for own in placed.spans]


def _check_tower(tower: Tower, prepared: Sequence[Prepared]) -> None:
    slices = [each for medium in prepared for each in slices_of(medium)]
    made = [len(each) for each in tower([unpacked(each.payload) for each in slices])]
    said = [each.tokens for each in slices]
    assert made == said, f"encode makes {made} embeddings of slices that are said to have {said}"


# ── frames ───────────────────────────────────────────────────────────────────────────────────


def _pictures(height: int, width: int) -> Iterator[Frames]:
    """One of that size; the same if few tokens are wanted; another of the same size."""
    picture = _frames(1, height, width, 0)
    yield picture
    yield msgspec.structs.replace(picture, coarse=True)
    yield _frames(1, height, width, 1)


def _frames(count: int, height: int, width: int, seed: int, **more: Any) -> Frames:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + repr((pixels.shape, more)).encode()).digest()
    return Frames(pixels, digest=digest, **{"times": (), **more})


def _positions(placed: Placed) -> Any:
    """int32 [3, tokens]."""
    count = len(placed.ids)
    if not placed.positions:
        return np.broadcast_to(np.arange(count, dtype="<i4"), (3, count))
    size = len(placed.positions)
    assert size == 12 * count, f"positions have {size} bytes; 3 numbers of 4 bytes for {count} ids are {12 * count}"
    return np.frombuffer(placed.positions, "<i4").reshape(3, count)


@contextmanager
def _only_refuses(what: str) -> Iterator[list[RequestError]]:
    """A list, empty unless what is done within is refused."""
    refused: list[RequestError] = []
    try:
        yield refused
    except RequestError as error:
        refused.append(error)
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__}: {error}; only RequestError refuses") from error
