"""A picture or a clip of this machine as a part of a message, which any server with OpenAI's API takes.

Left out: what the model makes of it, and its bounds: who answers says so.
"""

import base64
import mimetypes
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

ELSEWHERE = ("http://", "https://", "data:", "file:")


def part_of(where: str) -> dict[str, Any]:
    """The part of a message that shows the file `where`, or what is at that URL, which the server gets then.

    Raises ConfigError for a file that cannot be read."""
    guessed = mimetypes.guess_type(where)[0] or ("image" if not where.startswith("data:") else where[5:11])
    kind = "video_url" if guessed.startswith("video") else "image_url"
    if not where.startswith(ELSEWHERE):
        try:
            data = Path(where).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
        media_type = guessed if "/" in guessed else "application/octet-stream"
        where = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return {"type": kind, kind: {"url": where}}
