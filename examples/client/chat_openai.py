"""Talk to the model through the openai client (`pip install openai`). An empty line or Ctrl-D ends the talk.

python examples/client/chat_openai.py

ENGINE_URL says where the server is, if not at http://127.0.0.1:8000.
"""

import os
from contextlib import suppress

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

URL = os.environ.get("ENGINE_URL", "http://127.0.0.1:8000")


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    while question := input("> "):
        messages.append({"role": "user", "content": question})
        answer = ""
        for event in client.chat.completions.create(model=model, messages=messages, max_tokens=500, stream=True):
            text = event.choices[0].delta.content or ""
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    with suppress(EOFError):  # Ctrl-D
        main()
