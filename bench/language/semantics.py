"""The same programs in SGLang's language and in ours, on a server of the default model; prints where values differ.

    pip download sglang --no-deps -d /tmp/sglang && unzip -q /tmp/sglang/*.whl -d /tmp/sglang
    engine serve &
    python -m bench.language.semantics http://127.0.0.1:8000 /tmp/sglang/sglang [--sees http://127.0.0.1:8001]

Only the language of SGLang is imported, and stand-ins take the place of what its utils.py imports and this does not
need. The exit code is 1 if a value differs. "choices by their gain" may differ: SGLang 0.5.23 asks for the
log-probabilities of the choices alone without logprob_start_len, which means none of them. Its means of a choice have
tokens of the prompt in them, which it means to take away, so choices of unlike lengths may differ where the model is
all but undecided.

With --sees, the server of a model that sees and whose template writes ChatML (Qwen's), pictures are compared too, and
how many tokens their prompts have. SGLang's language refuses a second picture of a program. Its text has all of them in
their places, so the cases of several lift that bound from its backend: what is compared is where pictures stand, and
not that it takes them. Left out: its backend for OpenAI's chats, which puts all pictures of a message behind its text
(and needs tiktoken), clips, whose frames it chooses by itself, and speed.
"""

import argparse
import base64
import importlib
import io
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import engine.lang
from engine.lang import Server

SIDE = 64  # pixels of a picture
EXPECTED = "choices by their gain"  # to differ
Cases = dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]]


def cases(language: Any) -> Cases:
    """Programs, each with what is read of its state."""

    def text(s: Any) -> None:
        s += "1, 2, 3," + language.gen("a", max_tokens=8) + "\n"
        s += "a b c" + language.gen("b", max_tokens=6, stop=[" f"])

    def several(s: Any) -> None:
        s += "The capital of France is" + language.gen("city", max_tokens=1) + "."
        with s.var_scope("scope"):
            s += " Its river is" + language.gen("river", max_tokens=4)

    def typed(s: Any) -> None:
        s += "A week has" + language.gen_int("days", max_tokens=5) + "days; "
        s += "pi is " + language.gen("pi", dtype=float, max_tokens=6) + "; it is "
        s += language.gen("true", dtype=bool, max_tokens=3) + " that " + language.gen_string("word", max_tokens=8)

    def constrained(s: Any) -> None:
        s += "A date: " + language.gen("date", regex="[0-9]{4}-[0-9]{2}", max_tokens=12)

    def selects(s: Any) -> None:
        s += "The capital of France is" + language.select("plain", [" Paris", " Lyon", " the city of light"])
        method = language.greedy_token_selection
        s += ", and that of Italy is" + language.select("greedy", [" Rome", " Milan", " Roma"], choices_method=method)

    def gains(s: Any) -> None:
        method = language.unconditional_likelihood_normalized
        s += "The capital of Italy is" + language.select("gains", [" Rome", " Milan", " Roma"], choices_method=method)

    def heals(s: Any) -> None:
        s += "Paris is the capit" + language.gen("end", choices=["al of France", "al", " of"])

    def chats(s: Any) -> None:
        s += language.system("Be brief.") + language.user("What is the capital of France?")
        s += language.assistant("It is" + language.gen("first", max_tokens=12))
        with s.user():
            s += "And of Italy?"
        with s.assistant():
            s += language.gen("second", max_tokens=12)

    def forks(s: Any) -> None:
        s += "Once upon a time"
        group = s.fork(3)
        group += lambda index: [" a king", " a queen", " a fox"][index]
        group += language.gen("tale", max_tokens=6)
        group.join()
        s += "".join(s["tale"]) + language.gen("end", max_tokens=4)

    def copies(s: Any) -> None:
        s += "1, 2,"
        with s.copy() as copy:
            copy += language.gen("lost", max_tokens=4)
            s.set_var("kept", copy["lost"])
        s += language.gen("next", max_tokens=4)

    def names(*wanted: str) -> Callable[[Any], Any]:
        return lambda s: [s[name] for name in wanted]

    return {
        "text and stops": (text, lambda s: (s["a"], s["b"], s.text())),
        "scopes": (several, lambda s: (s["city"], s["river"], s["scope"], s.text())),
        "typed values": (typed, names("days", "pi", "true", "word")),
        "regular expressions": (constrained, names("date")),
        "choices": (selects, lambda s: s.text()),
        EXPECTED: (gains, names("gains")),
        "token healing": (heals, names("end")),
        "roles": (chats, lambda s: (s["first"], s["second"], [m["content"] for m in s.messages()])),
        "forks": (forks, lambda s: (s["tale"], s["end"], s.text())),
        "copies": (copies, lambda s: (s["kept"], s["next"], s.text())),
    }


def drawn(*colours: str) -> bytes:
    """A picture of stripes, as a PNG."""
    from PIL import Image

    picture, width = Image.new("RGB", (SIDE, SIDE)), SIDE // len(colours)
    for index, colour in enumerate(colours):
        picture.paste(colour, (index * width, 0, (index + 1) * width, SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pictures(language: Any) -> Cases:
    """Programs that show one picture, and programs that show several."""
    red, flag = drawn("red"), drawn("black", "red", "yellow")

    def one(s: Any) -> None:
        s += language.system("Be brief.") + language.user("Look: " + language.image(red) + " What is it?")
        s += language.assistant(language.gen("what", max_tokens=12))
        s += language.user("Which colour?") + language.assistant("It is " + language.gen("colour", max_tokens=8))

    def chosen(s: Any) -> None:
        s += language.system("Be brief.") + language.user(language.image(flag))
        s += language.assistant("A " + language.select("kind", ["flag", "fish", "tree"]))

    def branches(s: Any) -> None:
        s += language.system("Be brief.") + language.user(language.image(flag) + "Whose?")
        forks = s.fork(2)
        forks += language.assistant(language.gen("whose", max_tokens=8))
        forks.join()

    def between(s: Any) -> None:
        s += language.system("Be brief.")
        s += language.user("First " + language.image(red) + ", then " + language.image(flag) + ". Which is larger?")
        s += language.assistant(language.gen("larger", max_tokens=12))
        s += language.user(language.image(flag) + "And this?") + language.assistant(language.gen("this", max_tokens=8))

    def side_by_side(s: Any) -> None:
        s += language.system("Be brief.") + language.user(language.image(flag) + language.image(red) + "Alike?")
        s += language.assistant(language.select("alike", ["same", "none"]) + language.gen("why", max_tokens=8))

    return {
        "a picture": (one, seen("what", "colour")),
        "a picture and choices": (chosen, lambda s: s["kind"]),
        "a picture and forks": (branches, lambda s: s["whose"]),
        "several, between texts": (between, seen("larger", "this")),
        "several, side by side": (side_by_side, lambda s: (s["alike"], s["why"])),
    }


def seen(*names: str) -> Callable[[Any], Any]:
    """What reads the values of some variables, and the tokens of the prompts before them."""

    def read(s: Any) -> Any:
        metas = [s.get_meta_info(name) for name in names]
        counts = [meta["prompt_tokens"] if isinstance(meta, dict) else meta.prompt_tokens for meta in metas]
        return [s[name] for name in names], counts

    return read


def sglang(folder: str) -> Any:
    """SGLang's language, from its package at `folder`."""

    def stand_in(name: str, **names: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(names)
        sys.modules[name] = module

    stand_in("sglang", __path__=[folder])
    stand_in("sglang.srt")
    stand_in("sglang.srt.environ", envs=SimpleNamespace())
    for name in ("IPython", "IPython.display"):
        stand_in(name, HTML=None, display=None)
    stand_in("pybase64", b64encode=base64.b64encode)
    language = importlib.import_module("sglang.lang.api")
    for name in ("greedy_token_selection", "unconditional_likelihood_normalized"):
        setattr(language, name, getattr(importlib.import_module("sglang.lang.choices"), name))
    return language


def outcome(state: Any, read: Callable[[Any], Any]) -> Any:
    """What is read of `state`, or what it fails with."""
    if (error := state.error()) is not None:
        return f"{type(error).__name__}: {error}"
    return read(state)


def endpoint(url: str, template: str) -> Any:
    """SGLang's backend, which takes any number of pictures."""
    runtime = importlib.import_module("sglang.lang.backend.runtime_endpoint")

    class Endpoint(runtime.RuntimeEndpoint):  # type: ignore[name-defined]
        def _add_images(self, s: Any, data: dict[str, Any]) -> None:
            if len(s.images_) < 2:
                super()._add_images(s, data)
                return
            shown = [each for _, each in s.images_]
            data["image_data"] = [shown] * len(data["text"]) if isinstance(data["text"], list) else shown

    return Endpoint(url, chat_template_name=template)


def compared(url: str, template: str, ours: Cases, theirs: Cases, language: Any) -> int:
    """How many cases differ that should not."""
    differing = 0
    backend = endpoint(url, template)
    with Server(url) as server:
        for (name, (our, read)), (their, _) in zip(ours.items(), theirs.values(), strict=True):
            found = outcome(engine.lang.function(our).run(backend=server, temperature=0), read)
            wanted = outcome(language.function(their).run(backend=backend, temperature=0), read)
            same = found == wanted
            differing += not same and name != EXPECTED
            print(f"{name:24}{'equal' if same else f'ours {found!r}, theirs {wanted!r}'}", flush=True)
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a server of the default model")
    parser.add_argument("folder", help="SGLang's package")
    parser.add_argument("--sees", metavar="URL", help="a server of a model that sees")
    given = parser.parse_args()
    theirs = sglang(given.folder)
    differing = compared(given.url, "chatml", cases(engine.lang), cases(theirs), theirs)
    if given.sees:
        differing += compared(given.sees, "qwen2-vl", pictures(engine.lang), pictures(theirs), theirs)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
