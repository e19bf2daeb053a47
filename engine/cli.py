"""The `engine` command: serve, generate, plugins.

No flag is declared here: those of the engine derive from `engine.config`, those of sampling from SamplingParams.
What a command needs is imported when it runs, so that `engine --help` costs a few milliseconds.
Every error raised on purpose ends as one line on standard error and exit code 2.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from msgspec import Struct

from engine import __version__
from engine.config import Config, ModelOptions, Option, groups, options_of, resolve
from engine.errors import ConfigError, EngineError, PluginError, did_you_mean
from engine.messages import SamplingParams

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    try:
        arguments = _parse(argv)
        run: Run = arguments.run
        return run(arguments)
    except EngineError as error:
        if isinstance(error, PluginError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"engine: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone; Python flushes it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# ── commands ─────────────────────────────────────────────────────────────────────────────────


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model over HTTP: the OpenAI API and a native one."""
    config = _config(arguments)
    from engine.launch import serve as serve_engine

    return serve_engine(config)


def generate(arguments: argparse.Namespace) -> int:
    """Print the model's reply to one prompt as it comes."""
    config = _config(arguments)
    params = _sampling(arguments)
    from engine.offline import Engine
    from engine.plugin.manager import Plugins

    checkpoint = Plugins.load(config.model.plugins).open_checkpoint(config.model.model)
    chat = not arguments.raw and checkpoint.text().chat_template is not None
    prompt = [{"role": "user", "content": arguments.prompt}] if chat else arguments.prompt
    with Engine(config) as engine:
        for chunk in engine.stream(prompt, params):
            print(chunk.text, end="", flush=True)
    print()
    return 0


def plugins(arguments: argparse.Namespace) -> int:
    """List the plugins that are known here."""
    from engine.plugin.manager import Plugins

    rows = Plugins.load(_config(arguments).model.plugins).listing()
    if arguments.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind", "version", "distribution", "hooks", "state", box=None, header_style="bold")
    for row in rows:
        table.add_row(row.name, row.kind, row.version, row.distribution, ", ".join(row.hooks), row.state)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


# ── the command line ─────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors raised as ours and the flags it knows at hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an argument that this parser does not know ends it here, with the nearest flag."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            kind = "option" if name.startswith("-") else "argument"
            self.error(f"unknown {kind} {name}{did_you_mean(name, self._option_string_actions)}")
        return found, []


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="engine", description="A small, fast, pluggable serving engine for large language models.")
    parser.add_argument("--version", action="version", version=f"engine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(commands, serve)
    for struct in groups().values():
        _add_group(command, struct)

    command = _command(commands, generate, " PROMPT")
    command.add_argument("prompt", metavar="PROMPT", help="what to say to the model")
    command.add_argument(
        "--raw", action="store_true", help="complete PROMPT as it is, without the model's chat template"
    )
    _add_group(command, SamplingParams, "Sampling")
    for name, struct in groups().items():
        if name != "server":
            _add_group(command, struct)

    command = _command(commands, plugins)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add(command, next(option for option in options_of(ModelOptions) if option.name == "plugins"))
    return parser.parse_args(argv)


def _command(commands: Any, run: Run, positional: str = "") -> argparse.ArgumentParser:
    name, about = run.__name__, (run.__doc__ or "").rstrip(".")
    usage = f"engine {name} [OPTIONS]{positional}"
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=f"{about}.", usage=usage)
    command.set_defaults(run=run)
    return command


def _add_group(command: argparse.ArgumentParser, struct: type[Struct], title: str | None = None) -> None:
    group = command.add_argument_group(title or (struct.__doc__ or "").rstrip("."))
    for option in options_of(struct):
        _add(group, option, repeated=struct is SamplingParams)


def _add(group: Any, option: Option, *, repeated: bool = False) -> None:
    """Add one flag. Its text stays text, for `Option.read`; a flag not given leaves no trace in the namespace."""
    default = "" if option.default in (None, ()) else f" (default: {str(option.default).lower()})"
    common: dict[str, Any] = {
        "dest": option.name,
        "default": argparse.SUPPRESS,
        "help": f"{option.description}{default}".replace("%", "%%"),
    }
    if option.kind is bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
        return
    word = {int: "N", float: "X", str: "TEXT"}.get(option.kind, "A,B")
    if option.listed and repeated:
        word = "TEXT" if "str" in str(option.kind) else "N"
        common |= {"action": "append", "help": common["help"] + "; may be repeated"}
    group.add_argument(option.flag, metavar="{" + ",".join(option.choices) + "}" if option.choices else word, **common)


def _config(arguments: argparse.Namespace) -> Config:
    """The Config that the command line and the environment say."""
    names = {option.name for struct in groups().values() for option in options_of(struct)}
    return resolve({name: value for name, value in vars(arguments).items() if name in names}, os.environ)


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    from engine.sampling import check_sampling

    given = [option for option in options_of(SamplingParams) if option.name in arguments]
    values = {option.name: option.read(getattr(arguments, option.name), option.flag) for option in given}
    params = SamplingParams(**values)
    check_sampling(params, {option.name: option.flag for option in given})
    return params


if __name__ == "__main__":
    sys.exit(main())
