"""Where the media of a conversation meet a model: refused, or put in place by the model's processor.

    Frames ─ prepare ─> Prepared: pixels for the tower, and how many tokens ─ placed ─> ids, keys, positions, spans

A processor is a plugin of the kind `media`, chosen by the architecture. `prepare` may run in any process, `placed`
where the prompt is encoded. What fetches and decodes media stands before this face (engine/media/).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from engine.cache.keys import media_keys
from engine.conversation.parts import Image, Message, Video, media_of
from engine.errors import RequestError, counted
from engine.media.frames import Frames
from engine.messages.assets import Need
from engine.messages.media import MediaUse, Prepared, Slice, media_need, slices_of
from engine.plugin.terms import Terms

Runs = Sequence[tuple[int, "array[int]"]]  # keys by the index that they begin at, as keys_with has them
Spans = tuple[tuple[int, int], ...]  # the first index, and how many
Encode = Callable[[str], list[int]]  # a text to token ids, nothing added


class Placed(Struct, frozen=True):
    """A prompt whose placeholders have become as many ids as their media take.

    `runs` are the keys of these (cache/keys.py); `spans` say where each medium's embeddings stand. `positions` (int32
    [3, len(ids)]: time, height, width) are where rotary embedding places the tokens, if not at their index. No step may
    compute a part of a span that is `whole`."""

    ids: Sequence[int]
    runs: Runs = ()
    spans: tuple[Spans, ...] = ()
    positions: bytes = b""
    whole: bool = False


class MediaProcessor(Protocol):
    """What one model makes of media. Made of config.json and of what the checkpoint says of processors, both as Terms;
    `encode` makes token ids of a text, where prompts are encoded. Picklable without it. What `choose_frames` and
    `prepare` raise goes on from the place of the medium: "… has too few frames"."""

    def __init__(self, config: Terms, processor: Terms, encode: Encode | None = None) -> None: ...

    def choose_frames(self, count: int, fps: float, duration: float, /) -> list[int]:
        """Which of the `count` frames of a clip of `duration` seconds the model is to see, ascending.

        Raises RequestError for a clip that it cannot take."""
        ...

    def prepare(self, frames: Frames, /) -> Prepared:
        """Raises RequestError for a size that the model cannot take."""
        ...

    def placed(self, ids: list[int], media: Sequence[Prepared], /) -> Placed:
        """The ids of a prompt, in which each placeholder has become as many as its medium takes. `media` are in the
        order of the placeholders. Raises RequestError where there are not as many."""
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


def needs_of(media: Sequence[Prepared], placed: Placed) -> tuple[Need, ...]:
    """What a request that shows `media`, `placed` in its prompt, waits for: each slice once, however often it is
    shown. Raises RequestError (500) where a processor has placed other embeddings than it has made."""
    slices: dict[bytes, Slice] = {}
    spans: dict[bytes, list[tuple[int, int]]] = {}
    made = [medium.tokens for medium in media]
    places = [sum([count for _, count in own]) for own in placed.spans]
    if made != places:
        raise RequestError(
            f"the model's processor of media has made {made} embeddings, and placed {places} in the prompt; its plugin "
            "is at fault: what a medium's spans count has to be its tokens",
            code="media_failed",
            status=500,
        )
    for medium, own in zip(media, placed.spans, strict=True):
        parts = slices_of(medium)
        for part, shown in zip(parts, cut_spans(own, [each.tokens for each in parts]), strict=True):
            slices.setdefault(part.digest, part)
            spans.setdefault(part.digest, []).extend(shown)
    return tuple(
        media_need(part, MediaUse(tuple(spans[digest]), part.tokens, placed.whole)) for digest, part in slices.items()
    )


def cut_spans(spans: Spans, sizes: Sequence[int]) -> Iterator[Spans]:
    """`spans` of a medium's embeddings, cut into those of the first `sizes[0]`, of the next `sizes[1]`, …"""
    left = iter(spans)
    begin = count = 0
    for size in sizes:
        own = []
        while size:
            if not count:
                begin, count = next(left)
            taken = min(size, count)
            own.append((begin, taken))
            begin, count, size = begin + taken, count - taken, size - taken
        yield tuple(own)


def cannot_be_cut(tokens: int, kept: int) -> RequestError:
    """For a prompt of which only the last tokens are asked for."""
    return RequestError(
        f"the prompt has {counted(tokens, 'token')}, of which {kept} are to be kept, and one that shows media cannot "
        "be cut; shorten it",
        param="prompt",
    )


def scored_after(asked: int, length: int, placed: Placed) -> int:
    """The position in a prompt of that length after which tokens are scored, where Generate says `asked`. Raises
    RequestError where a medium comes after one that is counted from the end: its tokens are no text."""
    if asked >= 0:
        return min(asked, length - 1)
    after = max(0, length + asked)
    if any(begin + count > after + 1 for spans in placed.spans for begin, count in spans):
        raise RequestError(
            "with a choice behind it the chat template writes something else before an image or a video, so that the "
            "choice cannot be scored behind one prompt; use another chat_template",
            param="messages",
        )
    return after


# ── what processors share ────────────────────────────────────────────────────────────────────


class Piece(Struct, frozen=True):
    """A part of what takes the place of a placeholder: `ids` as they are, or `count` embeddings at as many `ids[0]`."""

    ids: Sequence[int]
    count: int = 0


def check_places(ids: Sequence[int], media: Sequence[Prepared], placeholders: Mapping[int, str]) -> None:
    """Raises RequestError where `placeholders` among `ids` are not as many as `media`, or of other kinds."""
    found = [placeholders[id] for id in ids if id in placeholders]
    sent = [medium.kind for medium in media]
    if found != sent:
        raise RequestError(
            f"the prompt has {counted(len(found), 'place')} for media ({', '.join(found) or 'none'}), and "
            f"{counted(len(sent), 'medium', 'media')} came with it ({', '.join(sent)}); send one for each place, in "
            "order",
            param="messages",
        )


def keys_of(medium: Prepared) -> "array[int]":
    """The keys of the tokens that show `medium`: slice by slice, so clips that begin alike have the same at first."""
    keys = array("i")
    for each in slices_of(medium):
        keys += media_keys(each.key or each.digest, each.tokens)
    return keys


def grow(
    ids: Sequence[int],
    media: Sequence[Prepared],
    placeholders: Mapping[int, str],
    pieces: Callable[[Prepared], Iterable[Piece]],
) -> Placed:
    """`ids` with the `pieces` of each medium in the place of its placeholder; `placeholders` are the ids that stand for
    a medium of some kind. Raises RequestError as `check_places`."""
    if not media:
        return Placed(list(ids))
    check_places(ids, media, placeholders)
    whole: list[int] = []
    runs, spans = [], []
    left = iter(media)
    for id in ids:
        if id not in placeholders:
            whole.append(id)
            continue
        medium = next(left)
        keys, begun, own = keys_of(medium), 0, []
        for piece in pieces(medium):
            if not piece.count:
                whole += piece.ids
                continue
            own.append((len(whole), piece.count))
            runs.append((len(whole), keys[begun : begun + piece.count]))
            whole += [piece.ids[0]] * piece.count
            begun += piece.count
        assert begun == medium.tokens, f"{begun} places for {medium.tokens} embeddings"
        spans.append(tuple(own))
    return Placed(whole, runs, tuple(spans))
