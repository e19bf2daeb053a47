#!/bin/sh
# The Python clients of OpenAI and Anthropic come from one generator, and part ways over a long Retry-After. Up to 120 seconds
# both wait as told. Beyond that openai does not retry at all, where without the header it would have; anthropic sleeps for as
# long as the header says, an hour at each of its two retries. So a server that is honest about a long restart loses one
# kind of client and parks the other. A Retry-After of 0 is not "at once" to either: both fall back to their own back-off.
# 409 and 501 are retried, 425 (Too Early) is not, and the header `x-should-retry` overrules the status in both directions,
# so a server can stop pointless retries of its final answers.
#
# The script gives each client a transport without a network, and records what it would have slept.
#
# Seen: openai 3.57.0, anthropic 2.14.0, Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openai==3.57.0 anthropic==2.14.0
"$folder/venv/bin/python" - <<'PYTHON'
import time

import anthropic
import httpx2
import openai

TALK = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
slept = []
time.sleep = slept.append


def waits(kind, status, headers):
    """The seconds before each retry of an answer that stays the same."""
    slept.clear()
    answer = {"error": {"message": "no", "type": "no"}}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, headers=headers, json=answer))
    client = kind(api_key="k", base_url="http://server/v1", http_client=httpx2.Client(transport=transport))
    send = client.chat.completions.create if kind is openai.OpenAI else client.messages.create
    try:
        send(**TALK)
    except (openai.APIStatusError, anthropic.APIStatusError):
        return list(slept)
    raise AssertionError("an error was expected")


def both(status, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    found = waits(openai.OpenAI, status, headers), waits(anthropic.Anthropic, status, headers)
    print(f"{status} {headers!s:28} openai {[round(s, 1) for s in found[0]]}  anthropic {[round(s, 1) for s in found[1]]}")
    return found


assert both(503, retry_after="120") == ([120, 120], [120, 120])
assert both(503, retry_after="121") == ([], [121, 121])
assert both(503, retry_after="3600") == ([], [3600, 3600])
for status, headers in ((503, {"retry_after": "0"}), (409, {}), (501, {}), (400, {"x_should_retry": "true"})):
    for own in both(status, **headers):
        assert len(own) == 2 and 0 < own[0] <= 0.5 < own[1] <= 1, own
assert both(425) == both(503, x_should_retry="false") == ([], [])
PYTHON
