"""Few-shot classification: `select` scores each label behind examples that all texts share.

python examples/language/classification.py
"""

from engine import Engine
from engine.lang import State, function, select

LABELS = [" food", " travel", " money"]
EXAMPLES = """Text: The soup needs more salt. Topic: food
Text: Our train leaves at noon. Topic: travel
Text: The bank raised its rates. Topic: money
Text: She baked bread with olives. Topic: food
Text: He paid the bill in cash. Topic: money
Text: We flew over the mountains. Topic: travel
"""
TEXTS = ["The cake was too sweet.", "The hotel is near the beach.", "My loan costs four percent.", "He fried two eggs."]


@function
def topic(s: State, text: str) -> None:
    s += EXAMPLES + f"Text: {text} Topic:" + select("label", LABELS)


def main() -> None:
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        topic.run("Warm up.", backend=engine)  # the examples are in the cache from here on
        states = topic.run_batch([{"text": text} for text in TEXTS], backend=engine)
        print(f"{'prompt':>8}{'cached':>8}  topic")
        for text, s in zip(TEXTS, states, strict=True):
            print(f"{s.usage.prompt_tokens:8}{s.usage.cached_tokens:8} {s['label']}: {text}")
        prompt = sum(s.usage.prompt_tokens for s in states)
        cached = sum(s.usage.cached_tokens for s in states)
        print(f"{prompt:8}{cached:8}  {cached / prompt:.0%} of the prompts' tokens were cached")


if __name__ == "__main__":
    main()
