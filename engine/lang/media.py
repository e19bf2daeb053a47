"""Pictures and clips that a program shows: files become data: URLs, and URLs stay as they are.

What a model does with them is the server's; a model that reads text alone refuses them. Left out: decoding, resizing.
"""

import base64
import mimetypes
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


def image_part(source: str | Path | bytes, detail: str | None = None) -> dict[str, Any]:
    """A picture as OpenAI's chats have it. Raises ConfigError for a file that cannot be read."""
    return {
        "type": "image_url",
        "image_url": {"url": url_of(source, "image"), **({"detail": detail} if detail else {})},
    }


def video_part(source: str | Path | bytes) -> dict[str, Any]:
    """A clip as servers of open models have it. Raises ConfigError for a file that cannot be read."""
    return {"type": "video_url", "video_url": {"url": url_of(source, "video")}}


def url_of(source: str | Path | bytes, kind: str) -> str:
    """`source`, a URL, the path of a file, or the bytes of one, as a URL; `kind` is image or video."""
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return source
    if isinstance(source, bytes):
        guessed, data = _kind_of(source), source
    else:
        guessed = mimetypes.guess_type(str(source))[0]
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{kind}({str(source)!r:.200}): {error.strerror}; give a file, its bytes or a URL"
            ) from None
    return f"data:{guessed or f'{kind}/*'};base64,{base64.b64encode(data).decode()}"


def _kind_of(data: bytes) -> str | None:
    """The type of a file, by how its bytes begin."""
    known = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    return next((name for start, name in known.items() if data.startswith(start)), None)
