"""The `engine` command: serve, chat, generate, bench, experts, cache, top, plugins, completion; and those of plugins.

No flag is declared here: those of the engine derive from `engine.config`, those of sampling from SamplingParams,
those of chat and bench from `engine.client.options`.
What a command needs is imported when it runs, so that `engine --help` costs a few milliseconds.
Every error raised on purpose ends as one line on standard error and exit code 2.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from msgspec import Struct

from engine import __version__
from engine.client.options import (
    BatchOptions,
    ChatOptions,
    ExpertsOptions,
    HeldOptions,
    LengthOptions,
    LoadOptions,
    RepeatOptions,
    ReportOptions,
    TopOptions,
    TrafficOptions,
    sampling_options,
)
from engine.config import Config, ModelOptions, ServerOptions, groups, read_file, resolve
from engine.errors import ConfigError, EngineError, PluginError, RequestError, Words, did_you_mean
from engine.options.option import Option, options_of
from engine.params.sampling import SamplingParams, check_sampling
from engine.router.options import RegisterOptions, UpOptions, router_groups

SHELLS = ("bash", "zsh", "fish", "tcsh")
Run = Callable[[argparse.Namespace], int]
Given = TypeVar("Given", bound=Struct)


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
    from engine.runtime.serve import serve as serve_engine

    return serve_engine(config)


def router(arguments: argparse.Namespace) -> int:
    """Route requests to several engines, each where its prefix is cached."""
    from engine.router.options import resolve_router

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    config = resolve_router(given, os.environ)
    from engine.router.serve import run_router

    return run_router(config)


def up(arguments: argparse.Namespace) -> int:
    """Start several engines and a router before them, on this machine."""
    config = _config(arguments)
    options = _given(UpOptions, arguments)
    from engine.router.up import run_up

    return run_up(config, options, os.environ)


def generate(arguments: argparse.Namespace) -> int:
    """Print the model's reply to one prompt as it comes."""
    config = _config(arguments)
    params = _sampling(arguments)
    import anyio

    from engine.runtime.offline import AsyncEngine

    async def print_reply() -> None:
        async with AsyncEngine(config) as engine:
            chat = not arguments.raw and engine.has_chat_template
            prompt = [{"role": "user", "content": arguments.prompt}] if chat else arguments.prompt
            async for chunk in engine.stream(prompt, params):
                print(chunk.text, end="", flush=True)
        print()

    anyio.run(print_reply, backend_options={"use_uvloop": True})
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Chat with a model in the terminal."""
    options = _given(ChatOptions, arguments)
    model = _remote_model(arguments, options.url)
    from engine.client.chat import chat as talk

    quiet = {} if "ENGINE_LOG_LEVEL" in os.environ else {"log_level": "warning"}  # a log line would cut into the chat
    return talk(_config(arguments, quiet), model, options, _sampling(arguments))


def bench_serve(arguments: argparse.Namespace) -> int:
    """Measure a server under load: ours, or any with OpenAI's /v1/completions."""
    load = _given(LoadOptions, arguments)
    model = _remote_model(arguments, load.url)
    from engine.client.bench.commands import serve as measure

    traffic = _given(TrafficOptions, arguments)
    return measure(_config(arguments), model, traffic, load, _given(ReportOptions, arguments))


def bench_throughput(arguments: argparse.Namespace) -> int:
    """Measure the offline engine with all requests at once."""
    from engine.client.bench.commands import throughput as measure

    return measure(_config(arguments), _given(TrafficOptions, arguments), _given(ReportOptions, arguments))


def bench_latency(arguments: argparse.Namespace) -> int:
    """Measure the offline engine with one batch after another."""
    from engine.client.bench.commands import latency as measure

    lengths, batches = _given(LengthOptions, arguments), _given(BatchOptions, arguments)
    return measure(_config(arguments), lengths, batches, _given(ReportOptions, arguments))


def bench_startup(arguments: argparse.Namespace) -> int:
    """Measure fresh processes from start to ready and to the first token."""
    from engine.client.bench.commands import startup as measure

    return measure(_config(arguments), _given(RepeatOptions, arguments), _given(ReportOptions, arguments))


def experts(arguments: argparse.Namespace) -> int:
    """Show how busy a server's experts are, by layer and rank."""
    options = _given(ExpertsOptions, arguments)
    from engine.client.experts import show

    return show(options, _config(arguments))


def cache(arguments: argparse.Namespace) -> int:
    """Show what a server's KV cache holds, by tier and by session, or clear it."""
    options = _given(HeldOptions, arguments)
    from engine.client import held

    return (held.clear if arguments.action == "clear" else held.show)(options, _config(arguments))


def top(arguments: argparse.Namespace) -> int:
    """Show what a server is doing: steps, requests, queue, pages of the cache, as its page does."""
    options = _given(TopOptions, arguments)
    from engine.client.top import show

    return show(options, _config(arguments))


def plugins(arguments: argparse.Namespace) -> int:
    """List the plugins that are known here."""
    from engine.plugin.registry import Plugins

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


def completion(arguments: argparse.Namespace) -> int:
    """Print the completion of commands and flags for a shell: source <(engine completion bash)."""
    import shtab

    print(shtab.complete(_parser(), arguments.shell))
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
    words = sys.argv[1:] if argv is None else list(argv)
    return _parser(words).parse_args(words)


def _parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """For the command line `words`; they matter only where they name plugins, and a command of theirs."""
    parser = _Parser(prog="engine", description="A small, fast, pluggable serving engine for large language models.")
    parser.add_argument("--version", action="version", version=f"engine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(commands, serve)
    _add_file(command)
    for struct in groups().values():
        _add_group(command, struct)

    command = _command(commands, router)
    for struct in router_groups().values():
        _add_group(command, struct)

    command = _command(commands, up)
    _add_group(command, UpOptions)
    _add_file(command)
    for struct in groups().values():
        if struct is not RegisterOptions:
            _add_group(command, struct)

    command = _command(commands, chat)
    _add_group(command, ChatOptions)
    _add_sampling(command)
    _add_engine(command)
    _add(command, _option(ServerOptions, "api_key"))

    command = _command(commands, generate, " PROMPT")
    command.add_argument("prompt", metavar="PROMPT", help="what to say to the model")
    command.add_argument(
        "--raw", action="store_true", help="complete PROMPT as it is, without the model's chat template"
    )
    _add_sampling(command)
    _add_engine(command)
    _parse_bench(commands)
    _parse_looks(commands)

    command = _command(commands, plugins)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add(command, _option(ModelOptions, "plugins"))

    command = _command(commands, completion, " SHELL")
    command.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    first = next(iter(words), "")
    if first not in commands.choices and (named := _named_plugins(words)):
        _add_registered(commands, named, first)
    return parser


def _named_plugins(words: Sequence[str]) -> tuple[str, ...]:
    """What --plugins among `words` says, or else ENGINE_PLUGINS."""
    option = _option(ModelOptions, "plugins")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(option.flag, default=os.environ.get(option.variable, ""))
    with suppress(argparse.ArgumentError):  # the command's own parser says what is wrong
        names: tuple[str, ...] = option.read(finder.parse_known_args(words)[0].plugins, option.flag)
        return names
    return ()


def _add_registered(commands: Any, named: Sequence[str], wanted: str) -> None:
    """Add the commands that the plugins `named` register; only the one that is `wanted` is imported.

    Raises PluginError for one that has the name of a command of ours."""
    from engine.plugin.registry import Plugins
    from engine.plugin.registry import resolve as imported

    plugins = Plugins.load(named)
    for name, entry in plugins.entries("commands").items():
        if name in commands.choices:
            source = plugins.sources["commands", name]
            raise PluginError(f"the command {name!r} of {source} has the name of engine's own; leave it out")
        about = entry.description.rstrip(".")
        command = commands.add_parser(
            name, help=about or None, description=f"{about}.", usage=f"engine {name} [OPTIONS]"
        )
        _add(command, _option(ModelOptions, "plugins"))
        if name == wanted:
            made = imported(entry.target)()
            made.add_arguments(command)
            command.set_defaults(run=made.run)


def _parse_looks(commands: Any) -> None:
    """The commands that look at a server."""
    looks = (experts, ExpertsOptions, ""), (cache, HeldOptions, " [clear]"), (top, TopOptions, "")
    for look, options, words in looks:
        command = _command(commands, look, words)
        if look is cache:
            kinds: dict[str, Any] = {"choices": ("show", "clear"), "default": "show", "metavar": "clear", "nargs": "?"}
            command.add_argument("action", help="forget all that it holds", **kinds)
        _add_group(command, options)
        _add(command, _option(ServerOptions, "api_key"))


def _parse_bench(commands: Any) -> None:
    about = "Measure a server, the offline engine, or the start"
    bench = commands.add_parser("bench", help=about, description=f"{about}.", usage="engine bench COMMAND [OPTIONS]")
    # By default argparse takes the usage line for the name of the command, and errors name that.
    measurements = bench.add_subparsers(metavar="COMMAND", required=True, prog="engine bench")
    for run, structs in (
        (bench_serve, (LoadOptions, TrafficOptions)),
        (bench_throughput, (TrafficOptions,)),
        (bench_latency, (BatchOptions, LengthOptions)),
        (bench_startup, (RepeatOptions,)),
    ):
        command = _command(measurements, run)
        for struct in (*structs, ReportOptions):
            _add_group(command, struct)
        _add_engine(command)
        if run is bench_serve:
            _add(command, _option(ServerOptions, "api_key"))


def _command(commands: Any, run: Run, positional: str = "") -> argparse.ArgumentParser:
    """The parser of `run`; `bench_serve` is the command `serve` of the command `bench`."""
    words, about = run.__name__.split("_"), (run.__doc__ or "").rstrip(".")
    usage = f"engine {' '.join(words)} [OPTIONS]{positional}"
    command: argparse.ArgumentParser = commands.add_parser(words[-1], help=about, description=f"{about}.", usage=usage)
    command.set_defaults(run=run)
    return command


def _add_engine(command: argparse.ArgumentParser) -> None:
    """The options of an engine without a server."""
    _add_file(command)
    for name, struct in groups().items():
        if name != "server":
            _add_group(command, struct)


def _add_file(command: argparse.ArgumentParser) -> None:
    about = "a TOML file of options, which flags and the environment overrule"
    command.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=about)


def _add_group(command: argparse.ArgumentParser, struct: type[Struct]) -> None:
    group = command.add_argument_group((struct.__doc__ or "").rstrip("."))
    for option in options_of(struct):
        _add(group, option)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("Sampling")
    for option in sampling_options():
        _add(group, option, repeated=True)


def _add(group: Any, option: Option, *, repeated: bool = False) -> None:
    """Add one flag. Its text stays text, for `Option.read`; a flag not given leaves no trace in the namespace."""
    common: dict[str, Any] = {
        "dest": option.name,
        "default": argparse.SUPPRESS,
        "help": option.help.replace("%", "%%"),
    }
    if option.kind is bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
        return
    number = "SIZE" if option.in_bytes else "N"
    word = {int: number, float: "X", str: "TEXT"}.get(option.kind, "A,B" if option.listed else "JSON")
    if option.listed and repeated:
        word = "TEXT" if "str" in str(option.kind) else "N"
        common |= {"action": "append", "help": common["help"] + "; may be repeated"}
    group.add_argument(option.flag, metavar="{" + ",".join(option.choices) + "}" if option.choices else word, **common)


def _config(arguments: argparse.Namespace, unless_given: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The Config that the command line, the environment and the file of `--config` say."""
    names = {option.name for struct in groups().values() for option in options_of(struct)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    path = getattr(arguments, "config", None) or os.environ.get("ENGINE_CONFIG")
    return resolve({**unless_given, **given}, os.environ, read_file(path) if path else {})


def _option(struct: type[Struct], name: str) -> Option:
    return next(option for option in options_of(struct) if option.name == name)


def _given(struct: type[Given], arguments: argparse.Namespace) -> Given:
    """A `struct` of what the command line says; the rest is at its default."""
    return struct(**_values(options_of(struct), arguments))


def _values(options: Iterable[Option], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of `options`, by their names."""
    given = [option for option in options if option.name in arguments]
    return {option.name: option.read(getattr(arguments, option.name), option.flag) for option in given}


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    options = sampling_options()
    try:
        params = SamplingParams(**_values(options, arguments))
        check_sampling(params)
    except RequestError as error:
        raise error.worded(Words({option.name: option.flag for option in options})) from None
    return params


def _remote_model(arguments: argparse.Namespace, url: str | None) -> str | None:
    """The --model to ask the server at `url` for. Other options of an engine are that server's own affair."""
    if url is None:
        return None
    for group, struct in groups().items():
        for option in options_of(struct):
            if group != "server" and option.name in arguments and option.name != "model":
                raise ConfigError(
                    f"{option.flag} is for an engine that starts here, but --url names one that runs; drop one"
                )
    return getattr(arguments, "model", None)


if __name__ == "__main__":
    sys.exit(main())
