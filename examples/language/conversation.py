"""A conversation of several turns: what was said before is taken from the cache.

python examples/language/conversation.py
"""

from engine import Engine
from engine.lang import State, assistant, function, gen, system, user

QUESTIONS = ["What is the capital of France?", "What is it known for?", "Name one river there."]
RULES = "You are a guide for travellers. Answer in one short sentence, in plain words, and do not invent anything. "


@function
def guide(s: State, questions: list[str]) -> None:
    s += system(RULES * 4)
    for number, question in enumerate(questions):
        s += user(question)
        s += assistant(gen(f"answer {number}", max_tokens=30))


def main() -> None:
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        s = guide.run(QUESTIONS, backend=engine, temperature=0)
        print(f"{'prompt':>8}{'cached':>8}  answer")
        for number, question in enumerate(QUESTIONS):
            meta = s.get_meta_info(f"answer {number}")
            print(f"{meta.prompt_tokens:8}{meta.cached_tokens:8}  {question} {s[f'answer {number}'].strip()}")
        saved = s.usage.cached_tokens / s.usage.prompt_tokens
        print(f"{s.usage.prompt_tokens:8}{s.usage.cached_tokens:8}  {saved:.0%} of the prompts' tokens were cached")


if __name__ == "__main__":
    main()
