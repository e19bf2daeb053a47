"""Stream a reply from /generate with aiohttp alone.

python examples/client/stream_aiohttp.py "The capital of France is"

ENGINE_URL says where the server is, if not at http://127.0.0.1:8000.
"""

import asyncio
import json
import os
import sys

import aiohttp

URL = os.environ.get("ENGINE_URL", "http://127.0.0.1:8000")


async def main(prompt: str) -> None:
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 64}, "stream": True}
    printed = 0
    async with aiohttp.ClientSession(URL) as session, session.post("/generate", json=body) as response:
        if response.status != 200:
            sys.exit((await response.json())["error"]["message"])
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:  # the stream began well and failed later
                sys.exit(event["error"]["message"])
            print(event["text"][printed:], end="", flush=True)  # an event holds the reply so far
            printed = len(event["text"])
    print(f"\n{event['meta_info']}")


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "The capital of France is"))
