"""docs/fields.md, whole: the sampling fields, then every field of every body, as served, a hint or refused.

`python -m engine.http.fields_page > docs/fields.md` writes it.
"""

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import get_type_hints

from engine.http.app import ROUTES
from engine.http.fields import HEADER, Rule
from engine.http.openapi import Route
from engine.http.wire import Body, structs_in, to_json
from engine.options.option import options_of
from engine.params.sampling import APIS, FIELDS, SamplingParams

HEAD = f"""# Fields of requests

<!-- Written by `make docs` from the bodies in engine/http; edit there. -->

Each field of a request's body is of one of three classes; the sampling fields, which are served, have a table first.

- **Served**: the engine does what it says. [http.md](http.md) tells how.
- **Hint**: the reply is right without it. It is ignored, the log says so once for each field, and every answer to such
  a request names it in the header `{HEADER}`. With `--strict-fields` it is refused, but for those marked
  "label", which say who asks, or how to keep, cache or bill, and "echo", which come back from a reply and are not
  named in the header.
- **Refused**: the reply would be wrong without it: a 400 with the code `unsupported_parameter`.

Values in brackets ask for what is done anyway, and are taken of hints and of refused fields alike; so is `null`. Fields
that are in no table are refused as well, with the code `unknown_parameter` and the name that is nearest.
Whether `reasoning_effort`, `reasoning.effort` and `output_config.effort` are served or hints is for the model's chat
template to say ([tools.md](tools.md#reasoning)), and of `include` in `/v1/responses` all but
`message.output_text.logprobs` is a hint: it asks for what is always empty.
"""


def page(routes: Sequence[Route] = ROUTES) -> str:
    """docs/fields.md, whole."""
    bodies: dict[type[Body], list[str]] = {}
    for route in routes:
        if route.takes is not None and route.method == "POST":
            bodies.setdefault(route.takes, []).append(f"`{route.public_path}`")
    lines = [HEAD, *_sampling()]
    for body, paths in bodies.items():
        lines += [f"## {', '.join(paths)}", ""]
        lines += _body(body)
    return "\n".join(lines).rstrip() + "\n"


def _sampling() -> Iterator[str]:
    """The table of the sampling fields, and what the APIs call them."""
    yield from (
        "## Sampling fields",
        "",
        f"| field | holds | meaning | {' | '.join(APIS)} |",
        f"|{'---|' * (3 + len(APIS))}",
    )
    about = {option.name: option.description for option in options_of(SamplingParams)}
    for field in FIELDS:
        names = (", ".join(f"`{name}`" for name in field.names(api)) for api in APIS)
        yield f"| `{field.name}` | {field.kind.holds} | {about[field.name]} | {' | '.join(names)} |"
    yield ""


def _body(body: type[Body]) -> Iterator[str]:
    """The lists of `body`, and those of each body inside it that has rules."""
    for path, part in _parts(body, ""):
        if part is not body and not part.rules and part.whole is None:
            continue
        lists = {"served": _served(part), "hint": _ruled(part, "hint"), "refused": _ruled(part, "refused")}
        told = [f"**{name}** {', '.join(fields)}" for name, fields in lists.items() if fields]
        yield from wrap(
            f"- {f'`{path}`' if path else 'the body'}: {'; '.join(told)}",
            118,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    yield ""


def _parts(body: type[Body], path: str) -> Iterator[tuple[str, type[Body]]]:
    """`body` and the bodies inside it, each with where it stands."""
    yield path, body
    for name, kind in get_type_hints(body).items():
        if name in body.__struct_fields__:
            for inner in structs_in(kind, Body):
                tag = inner.__struct_config__.tag
                place = f"{path}.{name}" if path else name
                yield from _parts(inner, f"{place}:{tag}" if tag else place)


def _served(body: type[Body]) -> list[str]:
    return [] if body.whole is not None else [f"`{name}`" for name in body.__struct_fields__ if name not in body.rules]


def _ruled(body: type[Body], kind: str) -> list[str]:
    if body.whole is not None:
        return ["as a whole"] if body.whole.kind == kind else []
    return [_described(name, rule) for name, rule in body.rules.items() if rule.kind == kind]


def _described(name: str, rule: Rule) -> str:
    """A field that is not served, and what of it is taken."""
    values = " or ".join(f"`{to_json(value).decode()}`" for value in rule.neutral)
    what = f"`{name}`" + (f" [{values}]" if values else "")
    if rule.only is not None:
        what += f" (only {rule.only.says})"
    if rule.kind == "hint" and not rule.strict:
        what += " (label)" if rule.told else " (echo)"
    return what


if __name__ == "__main__":
    print(page(), end="")
