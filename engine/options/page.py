"""docs/options.md, written from the structs that declare the options. `python -m engine.config` prints it."""

from collections.abc import Iterable

from msgspec import Struct

from engine.options.option import options_of


def options_page(engine: Iterable[type[Struct]], router: Iterable[type[Struct]]) -> str:
    """docs/options.md, whole: a table for each struct, those of the engine first."""
    lines = [
        "# Options",
        "",
        "<!-- Written by `make docs` from engine/config.py; edit there. -->",
        "",
        "Each option is a flag of `engine serve` and `engine generate` (those of the HTTP server only of the former),",
        "and a variable of the environment, which the flag overrules: `--max-running 8` or `ENGINE_MAX_RUNNING=8`.",
        "`--config serve.toml`, or `ENGINE_CONFIG`, names a TOML file of options: `max_running = 8`, at its top level",
        "or in a table named as the group (`[schedule]`). Flags and variables overrule it.",
        "A true-or-false option has two flags: `--prefix-cache` and `--no-prefix-cache`.",
        "A size is a number of bytes, or a number with a unit: KiB, MiB, GiB and TiB count in 1024, kB, MB, GB and TB",
        "in 1000. So `64MiB` is `67108864`.",
    ]
    lines += tables(engine)
    lines += [
        "",
        "# Options of the router",
        "",
        "Each is a flag of `engine router` ([router.md](router.md)), and a variable, which the flag overrules.",
    ]
    return "\n".join(lines + tables(router)) + "\n"


def tables(structs: Iterable[type[Struct]]) -> list[str]:
    """The lines of a table for each of `structs`."""
    lines = []
    for struct in structs:
        title = (struct.__doc__ or "").rstrip(".")
        lines += ["", f"## {title}", "", "| flag | variable | takes | default | meaning |", "|---|---|---|---|---|"]
        for option in options_of(struct):
            default = f"`{option.said_default}`" if option.said_default else ""
            cells = (f"`{option.flag}`", f"`{option.variable}`", option.expects, default, option.description)
            lines.append("| " + " | ".join(cells) + " |")
    return lines
