"""The options of images and video: where they may come from, and how much one may take."""

from typing import Annotated

from msgspec import Meta, Struct

from engine.options.option import Positive
from engine.options.sizes import Size

MOST_BYTES = 255 * 2**20  # of a source, which travels in a frame (runtime/channel.py)


class MediaOptions(Struct, frozen=True, kw_only=True):
    """Images and video."""

    media_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="hosts that images and video may be fetched from, cdn.example.com,*.example.org; networks, "
            "10.0.0.0/8, add addresses that are not public; none fetches nothing; default: any host with a public "
            "address"
        ),
    ] = ()
    media_root: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="directory below which file: URLs may name images and video; default: they are refused"),
    ] = None
    media_items: Annotated[Positive, Meta(description="most images and videos of one request")] = 128
    media_bytes: Annotated[
        Size,
        Meta(ge=1, le=MOST_BYTES, description="most bytes of one image or video, as it is sent or fetched"),
    ] = 64 * 2**20
    media_pixels: Annotated[
        Positive, Meta(description="most pixels of an image, or of one frame of a video, before it is resized")
    ] = 64 * 10**6
    media_video_pixels: Annotated[
        Positive, Meta(description="most pixels of all frames of a video that the model is to see, before resizing")
    ] = 512 * 10**6
    media_seconds: Annotated[
        float,
        Meta(gt=0, description="longest that fetching an image or a video may take, and as long again decoding it"),
    ] = 30.0
    media_processes: Annotated[
        Positive | None,
        Meta(description="processes that decode images and video; default: half of the processors, from 1 to 8"),
    ] = None
    media_memory: Annotated[
        Size,
        Meta(
            ge=0,
            description="bytes of decoded images and video that each front process keeps for requests to come",
        ),
    ] = 2**30
    media_known_memory: Annotated[
        Size,
        Meta(
            ge=0,
            description="bytes of images and video, as the model reads them, that the scheduler and each device "
            "process keep for requests to come, so that their embeddings are found again",
        ),
    ] = 512 * 2**20
    media_open_memory: Annotated[
        Size,
        Meta(
            ge=1,
            description="most bytes of decoded images and video that the open requests of a front process show; beyond "
            "it 503",
        ),
    ] = 4 * 2**30
