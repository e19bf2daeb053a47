"""Pages as files: each is one file that asks no other server for anything, and its script needs no build step.

Its headers let the browser hold it to that: only its own script and style are used, it speaks to this server alone, and
no other page can show it in a frame.
"""

import hashlib
import re
from base64 import b64encode
from functools import cache
from pathlib import Path

from aiohttp import web


def page(name: str, **said: bool) -> web.Response:
    """The file `name` beside this one, with the headers that guard it. Its script finds those of `said` that are so as
    data of the document."""
    body, policy = read(name)
    names = "".join(f" data-{name}" for name, is_so in said.items() if is_so)
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    body = body.replace(b'<html lang="en">', f'<html lang="en"{names}>'.encode(), 1)
    return web.Response(body=body, content_type="text/html", charset="utf-8", headers=headers)


@cache
def read(name: str) -> tuple[bytes, str]:
    """The file, and the policy that fits it."""
    text = Path(__file__).with_name(name).read_bytes()
    policy = (
        f"default-src 'none'; script-src {_digests(text, b'script')}; style-src {_digests(text, b'style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _digests(text: bytes, tag: bytes) -> str:
    """The digests of what stands in the tags of that name, as a policy has them."""
    found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(hashlib.sha256(each).digest()).decode()}'" for each in found)
