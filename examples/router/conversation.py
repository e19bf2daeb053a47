"""See where a router sends each turn of a conversation, and what that saves.

engine up --replicas 2
python examples/router/conversation.py

ENGINE_URL says where the router is, if not at http://127.0.0.1:8000.
"""

import asyncio
import os
import sys

import aiohttp

URL = os.environ.get("ENGINE_URL", "http://127.0.0.1:8000")
SYSTEM = "You are a patient teacher of geography. Answer in one short sentence. " * 8
QUESTIONS = ("Name three rivers.", "Which of them is the longest?", "Where does it end?")


async def main() -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    async with aiohttp.ClientSession(URL) as session:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            body = {"messages": messages, "max_tokens": 24, "temperature": 0}
            async with session.post("/v1/route", json=body) as response:  # a dry run: nothing is sent
                where = await response.json()
                if response.status != 200:
                    sys.exit(where["error"]["message"])
            async with session.post("/v1/chat/completions", json=body) as response:
                reply = await response.json()
                if response.status != 200:
                    sys.exit(reply["error"]["message"])
            messages.append(reply["choices"][0]["message"])
            cached = (reply["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            print(f"{question} {messages[-1]['content'].strip()!r}")
            print(f"  to {where['worker']}: {where['reason']}; {where['matched']} of {where['characters']} characters")
            print(f"  cached: {cached} of {reply['usage']['prompt_tokens']} tokens")


if __name__ == "__main__":
    asyncio.run(main())
