"""The same programs in SGLang's language and in ours, on a server of the default model; prints where values differ.

    pip download sglang --no-deps -d /tmp/sglang && unzip -q /tmp/sglang/*.whl -d /tmp/sglang
    engine serve &
    python bench/language/semantics.py http://127.0.0.1:8000 /tmp/sglang/sglang

Only the language of SGLang is imported, and stand-ins take the place of what its utils.py imports and this does not
need. The exit code is 1 if a value differs. "choices by their gain" may differ: SGLang 0.5.23 asks for the
log-probabilities of the choices alone without logprob_start_len, which means none of them. Left out: images, speed.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import engine.lang
from engine.lang import Server

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


def sglang(folder: str) -> Any:
    """SGLang's language, from its package at `folder`."""

    def stand_in(name: str, **names: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(names)
        sys.modules[name] = module

    stand_in("sglang", __path__=[folder])
    stand_in("sglang.srt")
    stand_in("sglang.srt.environ", envs=SimpleNamespace())
    for name in ("IPython", "IPython.display", "pybase64"):
        stand_in(name, HTML=None, display=None)
    language = importlib.import_module("sglang.lang.api")
    for name in ("greedy_token_selection", "unconditional_likelihood_normalized"):
        setattr(language, name, getattr(importlib.import_module("sglang.lang.choices"), name))
    return language


def outcome(state: Any, read: Callable[[Any], Any]) -> Any:
    """What is read of `state`, or what it fails with."""
    if (error := state.error()) is not None:
        return f"{type(error).__name__}: {error}"
    return read(state)


def main(url: str, folder: str) -> int:
    theirs = sglang(folder)
    differing = 0
    with Server(url) as server:
        module = importlib.import_module("sglang.lang.backend.runtime_endpoint")
        endpoint = module.RuntimeEndpoint(url, chat_template_name="chatml")
        for (name, (our, read)), (their, _) in zip(cases(engine.lang).items(), cases(theirs).values(), strict=True):
            found = outcome(engine.lang.function(our).run(backend=server, temperature=0), read)
            wanted = outcome(theirs.function(their).run(backend=endpoint, temperature=0), read)
            same = found == wanted
            differing += not same and name != EXPECTED
            print(f"{name:24}{'equal' if same else f'ours {found!r}, theirs {wanted!r}'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
