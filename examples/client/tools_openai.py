"""Let the model call a function of yours, with the openai client (`pip install openai`).

    engine serve --model Qwen/Qwen3-0.6B
    python examples/client/tools_openai.py "How long is the word antidisestablishmentarianism?"

Small models seldom call tools by themselves; `--must` makes this one.
ENGINE_URL says where the server is, if not at http://127.0.0.1:8000.
"""

import json
import os
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

URL = os.environ.get("ENGINE_URL", "http://127.0.0.1:8000")
COUNT: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "count_letters",
        "description": "Count the letters of a word.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 40}},
            "required": ["word"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def count_letters(word: str) -> str:
    return str(sum(character.isalpha() for character in word))


def main(question: str, must: bool) -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    first = client.chat.completions.create(
        model=model, messages=messages, tools=[COUNT], tool_choice="required" if must else "auto", max_tokens=500
    )
    said = first.choices[0].message
    if not said.tool_calls:
        print(said.content)
        return
    messages.append(said.to_dict())  # type: ignore[arg-type]
    for call in said.tool_calls:
        assert call.type == "function"
        result = count_letters(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments}) = {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    replies = client.chat.completions.create(model=model, messages=messages, tools=[COUNT], max_tokens=500, stream=True)
    for event in replies:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--must"]
    main(" ".join(words) or "How many letters has the word serendipity?", "--must" in sys.argv)
