"""`image_data` and `video_data` of /generate, in SGLang's forms: what each prompt of a request shows.

    "URL or base64"                 one, for each prompt
    ["…", {"url": "…"}]             of one prompt all that it shows; of a batch one for each prompt, null for none
    [["…", "…"], null, ["…"]]       of a batch all that each shows

The prompt has the model's own placeholder for each, `<|image_pad|>` between its marks in Qwen's models, in this order.
Left out: prompts whose video comes before an image, tensors, embeddings that are made already.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from engine.conversation.parts import Image, Video
from engine.errors import RequestError, counted
from engine.http.wire import Body

if TYPE_CHECKING:
    from engine.text.tokenizer import Text

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # no base64 has a colon
Shown = tuple[Image | Video, ...]


class VideoObject(Body):
    """A clip in an object, as clients have it."""

    url: str


class ImageObject(Body):
    """A picture with what is asked of it."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


Medium = str | ImageObject | VideoObject | None
Of = TypeVar("Of", bound=Body)
Given: TypeAlias = str | Of | list[str | Of | list[str | Of] | None] | None


def shown_by(
    images: Given[ImageObject], video: Given[VideoObject], count: int, text: "Text | None", *, batch: bool
) -> list[Shown]:
    """What each of `count` prompts shows, images first. Raises RequestError where the model of `text` reads text alone,
    or lists do not fit the prompts."""
    whole = [_each(given, count, name, batch) for name, given in (("image_data", images), ("video_data", video))]
    shown = [(*image, *clip) for image, clip in zip(*whole, strict=True)]
    first = next((each[0] for each in shown if each), None)
    if first is not None and text is not None and text.media is None:
        name = first.place.partition("[")[0]
        raise RequestError(
            f"{name} is given, and the model reads text alone; leave it out, or ask a model that reads it",
            param=name,
            code="unsupported_parameter",
        )
    return shown


def _each(given: Any, count: int, name: str, batch: bool) -> list[Shown]:
    """What each of `count` prompts shows of the field `name`."""
    if not isinstance(given, list):
        return [_at(given, name)] * count
    if not given:
        return [()] * count
    if not batch:
        for index, each in enumerate(given):
            if isinstance(each, list):
                raise RequestError(f"{name}[{index}] is a list, and there is one prompt; send one list", param=name)
        return [_all(given, name)]
    if len(given) != count:
        entries, prompts = counted(len(given), "entry", "entries"), counted(count, "prompt")
        raise RequestError(
            f"{name} has {entries} for {prompts}; send one for each, null or a list of several", param=name
        )
    return [
        _all(each, f"{name}[{index}]") if isinstance(each, list) else _at(each, f"{name}[{index}]")
        for index, each in enumerate(given)
    ]


def _all(given: Sequence[Medium], place: str) -> Shown:
    return tuple(chain.from_iterable(_at(each, f"{place}[{index}]") for index, each in enumerate(given)))


def _at(given: Medium, place: str) -> Shown:
    """What is at `place`, if anything is."""
    if given is None:
        return ()
    url = url_of(given if isinstance(given, str) else given.url)
    if place.startswith("video"):
        return (Video(url, place),)
    return (Image(url, place, detail=given.detail if isinstance(given, ImageObject) else None),)


def url_of(said: str) -> str:
    """The URL of what is one, the path of a file or base64. A path begins with a slash and has a dot in its last part,
    which no base64 has."""
    if SCHEME.match(said[:32]):
        return said
    if said.startswith("/") and "." in said[-256:].rpartition("/")[2]:
        return f"file://{quote(said)}"
    return f"data:;base64,{said}"
