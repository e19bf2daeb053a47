"""`image_data` and `video_data` of /generate, in SGLang's forms: what each prompt of a request shows.

    "URL or base64"                 one, for each prompt
    ["…", {"url": "…"}]             of one prompt all that it shows; of a batch one for each prompt, null for none
    [["…", "…"], null, ["…"]]       of a batch all that each shows

The prompt has the model's own placeholder for each, `<|image_pad|>` between its marks in Qwen's models, in this order.
Left out: prompts whose video comes before an image, tensors, embeddings that are made already.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from engine.conversation.parts import Image, Video
from engine.errors import RequestError, counted
from engine.http.wire import Body

if TYPE_CHECKING:
    from engine.text.tokenizer import Text

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # no base64 has a colon
Shown = tuple[Image | Video, ...]


class MediumObject(Body):
    """A medium with what is asked of it. `detail` is of images."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


Medium = str | MediumObject | None
Media = str | MediumObject | list[str | MediumObject | list[str | MediumObject] | None] | None


def shown_by(images: Media, video: Media, count: int, text: "Text | None", *, batch: bool) -> list[Shown]:
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


def _each(given: Media, count: int, name: str, batch: bool) -> list[Shown]:
    if not isinstance(given, list):
        return [_media([given], name, single=True)] * count
    if not given:
        return [()] * count
    if not batch:
        for index, each in enumerate(given):
            if isinstance(each, list):
                raise RequestError(f"{name}[{index}] is a list, and there is one prompt; send one list", param=name)
        return [_media([each for each in given if not isinstance(each, list)], name)]
    if len(given) != count:
        entries, prompts = counted(len(given), "entry", "entries"), counted(count, "prompt")
        raise RequestError(
            f"{name} has {entries} for {prompts}; send one for each, null or a list of several", param=name
        )
    return [
        _media(each, f"{name}[{index}]") if isinstance(each, list) else _media([each], f"{name}[{index}]", single=True)
        for index, each in enumerate(given)
    ]


def _media(given: Sequence[Medium], place: str, *, single: bool = False) -> Shown:
    """Those at `place`, each with a place of its own unless there is a `single` one."""
    found: list[Image | Video] = []
    for index, each in enumerate(given):
        if each is None:
            continue
        own = place if single else f"{place}[{index}]"
        url, detail = (each, None) if isinstance(each, str) else (each.url, each.detail)
        image = place.startswith("image")
        found.append(Image(url_of(url), own, detail=detail) if image else Video(url_of(url), own))
    return tuple(found)


def url_of(said: str) -> str:
    """The URL of what is one, the path of a file or base64. A path begins with a slash and has a dot in its last part,
    which no base64 has."""
    if SCHEME.match(said[:32]):
        return said
    if said.startswith("/") and "." in said[-256:].rpartition("/")[2]:
        return f"file://{quote(said)}"
    return f"data:;base64,{said}"
