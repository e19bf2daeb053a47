"""JSON of a schema out of texts: the rules that all prompts begin with are computed once, and forks run at once.

python examples/language/extraction.py
"""

import json

from engine import Engine
from engine.lang import State, assistant, function, gen, system, user

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
RULES = 'Read the text and write its facts as JSON, like {"name": "Ann", "age": 30}. Write nothing else. '
TEXTS = ["Maria is 34 and lives in Rome.", "Tom, aged 52, repairs clocks.", "Lena turned 9 in May."]


@function
def people(s: State, texts: list[str]) -> None:
    s += system(RULES * 3)
    s += user("Text: Bob is 41 and sells fish.") + assistant('{"name": "Bob", "age": 41}')
    forks = s.fork(len(texts))
    forks += [user(f"Text: {text}") for text in texts]
    forks += assistant(gen("person", json_schema=SCHEMA, max_tokens=40))
    forks.join()
    s.set_var("metas", [fork.get_meta_info("person") for fork in forks])


def main() -> None:
    with Engine(model="smollm2-135m", log_level="warning") as engine:
        s = people.run(TEXTS, backend=engine, temperature=0)
        print(f"{'prompt':>8}{'cached':>8}  name, age")
        for meta, text in zip(s["metas"], s["person"], strict=True):
            person = json.loads(text)
            print(f"{meta.prompt_tokens:8}{meta.cached_tokens:8}  {person['name']}, {person['age']}")
        saved = s.usage.cached_tokens / s.usage.prompt_tokens
        print(f"{s.usage.prompt_tokens:8}{s.usage.cached_tokens:8}  {saved:.0%} of the prompts' tokens were cached")


if __name__ == "__main__":
    main()
