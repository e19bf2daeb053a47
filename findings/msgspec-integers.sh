#!/bin/sh
# msgspec decodes a JSON integer of any size as a Python int. Its JSON encoder writes that int back exactly, but its
# MessagePack encoder raises OverflowError beyond 64 bits. So a value that passes validation at an HTTP edge can fail later,
# where the same struct crosses a process boundary as MessagePack. The format ends at 64 bits; the surprise is that the
# limit shows up one hop after the check.
#
# Seen: msgspec 0.23.0, Python 3.11, 2026-11-29.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check msgspec==0.23.0
"$folder/venv/bin/python" - <<'PYTHON'
from typing import Any

import msgspec


class Request(msgspec.Struct):
    schema: dict[str, Any]


for text in ("18446744073709551615", "18446744073709551616", "-9223372036854775809"):
    request = msgspec.json.decode(b'{"schema": {"maximum": %b}}' % text.encode(), type=Request)
    value = request.schema["maximum"]
    assert isinstance(value, int) and str(value) == text, value
    assert text.encode() in msgspec.json.encode(request)
    try:
        packed = msgspec.msgpack.encode(request)
        said = f"{len(packed)} bytes"
    except OverflowError as error:
        said = f"OverflowError: {error}"
    print(f"{text:>21}  JSON: exact both ways  MessagePack: {said}")
    assert (said.startswith("OverflowError")) == (not -(2**63) <= value < 2**64), said
PYTHON
