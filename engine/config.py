"""Every option, declared once: the command line, the environment and docs/options.md derive from here.

Options are grouped by who reads them; `Config` composes the groups, is resolved once at start, travels to
every process as msgpack, and is never changed. Field names are unique across groups: `max_running` is
`--max-running` on the command line, `ENGINE_MAX_RUNNING` in the environment and `max_running` in the TOML file of
`--config`. The command line overrules the environment, and the environment the file.

What a field is to people, its name, its bounds in words and how a text is read, is in engine/options/.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from engine.errors import ConfigError, did_you_mean
from engine.options.launchers import said_by_launcher
from engine.options.listening import ListenOptions
from engine.options.media import MediaOptions
from engine.options.option import Positive, options_of
from engine.options.page import options_page
from engine.options.parallel import ParallelOptions
from engine.options.resolving import refuse_unknown, said
from engine.options.sizes import Size
from engine.router.options import RegisterOptions, router_groups

Share = Annotated[float, Meta(gt=0, le=1)]


class ModelOptions(Struct, frozen=True, kw_only=True):
    """Model."""

    model: Annotated[
        str, Meta(description="a safetensors directory, a .gguf file, a Hugging Face id, or an embedded name")
    ] = "smollm2-135m"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="type of weights and activations; auto is float32 on a CPU, the checkpoint's own on a GPU"),
    ] = "auto"
    load: Annotated[
        Literal["auto", "dummy", "dummy-ties"],
        Meta(
            description="where weights come from: the checkpoint, or (dummy) a random generator, for benchmarks; with "
            "dummy-ties all tokens choose the same experts"
        ),
    ] = "auto"
    max_model_len: Annotated[
        Positive | None,
        Meta(description="longest prompt plus reply, in tokens; default: what the model and the memory allow"),
    ] = None
    plugins: Annotated[tuple[str, ...], Meta(description="plugins to load or to prefer, by name: a,b")] = ()
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Meta(
            description="sampling fields that a request leaves out: as the model's generation_config.json says, or as "
            "OpenAI's API does (temperature 1, nothing filtered)"
        ),
    ] = "model"
    chat_template: Annotated[
        str | None, Meta(description="a file with a Jinja chat template, or the template itself; default: the model's")
    ] = None


class CacheOptions(Struct, frozen=True, kw_only=True):
    """KV cache."""

    page_size: Annotated[int, Meta(ge=1, le=256, description="tokens in a page of the KV cache")] = 16
    kv_dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(description="type of the KV cache; auto is that of the activations, fp8 (E4M3) halves its bytes on a GPU"),
    ] = "auto"
    memory_fraction: Annotated[
        Share | None,
        Meta(description="share of the device's memory for weights and KV cache; default: 0.9 on a GPU, 0.3 on a CPU"),
    ] = None
    kv_tokens: Annotated[
        Positive | None,
        Meta(
            description="size of the KV cache in tokens, of each copy of attention; default: what --memory-fraction "
            "leaves"
        ),
    ] = None
    encoder_cache: Annotated[
        Annotated[Size, Meta(ge=2**20)] | None,
        Meta(
            description="memory of the device for encoded images and video, which are kept for prompts that show them "
            "again; default: 1GiB on a GPU, 256MiB on a CPU"
        ),
    ] = None
    prefix_cache: Annotated[
        bool, Meta(description="keep finished requests' KV pages for prompts that share a prefix")
    ] = True
    session_seconds: Annotated[
        float,
        Meta(gt=0, description="how long after its last request the KV pages of a session are preferred to others"),
    ] = 3600.0
    kv_host: Annotated[
        Annotated[Size, Meta(ge=1)] | None,
        Meta(
            description="memory of each host for KV pages that its devices have no room for, 64GiB; its ranks divide "
            "it; default: none, or with --kv-disk 4GiB at most"
        ),
    ] = None
    kv_disk: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="where each host keeps KV pages that outlive the engine, and at most how much, /path:500GiB; "
            "its ranks share it; default: nowhere"
        ),
    ] = None
    kv_policy: Annotated[
        Literal["write-through", "second-hit", "write-back"],
        Meta(
            description="when KV pages go down to the host and the disk: once they are computed, once they are asked "
            "for a second time, or when they have to give way on the device"
        ),
    ] = "write-through"
    kv_fetch: Annotated[
        Literal["sooner", "always"],
        Meta(
            description="which KV pages that a disk has are fetched: those that are there sooner than the device "
            "computes them, by the measured pace of both, or all"
        ),
    ] = "sooner"
    cache_events: Annotated[
        bool, Meta(description="tell routers which texts' KV pages are cached, at /v1/cache/events")
    ] = False


class ScheduleOptions(Struct, frozen=True, kw_only=True):
    """Scheduling."""

    max_running: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        Meta(
            description="most requests in one step, which copies of attention divide; default: 256 on a GPU, 64 on a "
            "CPU, for each copy"
        ),
    ] = None
    max_waiting: Annotated[int, Meta(ge=1, description="most requests in the queue; one more is answered 503")] = 4096
    max_step_tokens: Annotated[
        Positive | None,
        Meta(
            description="most tokens computed in one step, which copies of attention divide: prompts are cut into "
            "chunks of at most this; default: 8192 on a GPU, 2048 on a CPU, for each copy"
        ),
    ] = None
    encoder_tokens: Annotated[
        Positive | None,
        Meta(
            description="most tokens of images and video that are encoded at a time; an image that takes more is "
            "refused, a video is encoded in pieces; default: 16384 on a GPU, 4096 on a CPU"
        ),
    ] = None
    policy: Annotated[
        str,
        Meta(
            description="order of the waiting queue: fcfs, lpm (longest cached prefix), or a plugin's; "
            "auto takes a policy named in --plugins, else fcfs"
        ),
    ] = "auto"


class ProcessOptions(Struct, frozen=True, kw_only=True):
    """Processes."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="where the model runs; auto takes a GPU if there is one")
    ] = "auto"
    cuda_graphs: Annotated[bool, Meta(description="replay steps as CUDA graphs, where the backend allows it")] = True
    threads: Annotated[
        Positive | None, Meta(description="CPU threads of a worker; default: its share of the physical cores")
    ] = None
    placement: Annotated[
        Literal["auto", "single", "split"],
        Meta(description="single: HTTP and scheduler share a process; split: one each; auto: single up to 4 cores"),
    ] = "auto"
    fronts: Annotated[
        Literal["auto", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
        Meta(
            description="processes that serve HTTP and do the work on text, of `engine serve`; auto: beside a GPU one "
            "for each 4 cores, at most 8; else 1"
        ),
    ] = "auto"
    spare_worker: Annotated[
        bool | None,
        Meta(
            description="keep a second worker process that has imported what it needs, and waits for the first to die: "
            "150 MiB without a GPU; none where memory is short, or beside several workers; default: `engine serve` does"
        ),
    ] = None
    stall_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds of a silent worker before health says stalled, and of a front that stands still "
            "before another takes its place",
        ),
    ] = 60.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe log line shown")
    ] = "info"
    check_integrity: Annotated[
        bool,
        Meta(
            description="go through all KV pages whenever idle, and end if something does not fit together; a request "
            "that comes meanwhile waits, with many pages 0.1 s; default: where they are 1024 at most"
        ),
    ] = False


class GrammarOptions(Struct, frozen=True, kw_only=True):
    """Grammars."""

    grammar_seconds: Annotated[
        float, Meta(gt=0, description="longest that a grammar may take to compile; a slower one is answered 400")
    ] = 10.0
    grammar_helpers: Annotated[
        Positive | None,
        Meta(description="grammars compiled at a time; default: half of the processors, from 2 to 8"),
    ] = None
    grammar_cache: Annotated[
        int, Meta(ge=0, description="compiled grammars that are kept while no request uses them")
    ] = 256
    json_whitespace: Annotated[
        bool, Meta(description="JSON that a grammar asks for may have spaces and new lines between its tokens")
    ] = True


class ServerOptions(ListenOptions, frozen=True, kw_only=True):
    """HTTP server."""

    served_model_name: Annotated[
        tuple[str, ...],
        Meta(description="names that requests may give, a,b: the first is shown in replies; default: the checkpoint's"),
    ] = ()
    trust_request_chat_template: Annotated[
        bool,
        Meta(description="take chat_template from requests: a program, which can keep the server busy for long"),
    ] = False
    strict_fields: Annotated[
        bool,
        Meta(description="refuse the fields of requests that are ignored otherwise because no reply is wrong for it"),
    ] = False
    otlp_endpoint: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="collector that gets a trace of each request, http://localhost:4318 (OTLP over HTTP); default: "
            "none is made"
        ),
    ] = None
    profile_dir: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="directory that /start_profile may write traces to; default: it is refused"),
    ] = None
    metrics_aliases: Annotated[
        tuple[Literal["vllm", "sglang"], ...],
        Meta(
            description="servers by whose names /metrics shows its figures as well, vllm,sglang: for their dashboards"
        ),
    ] = ()
    tool_parser: Annotated[
        str,
        Meta(
            description="how calls of tools are read from replies: a parser's name, or none; auto goes by the chat "
            "template and the architecture"
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str, Meta(description="how reasoning is told from the reply: a parser's name, none, or auto")
    ] = "auto"


class Config(Struct, frozen=True, kw_only=True):
    """All options of one engine, by group."""

    model: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    parallel: ParallelOptions = ParallelOptions()
    process: ProcessOptions = ProcessOptions()
    grammar: GrammarOptions = GrammarOptions()
    media: MediaOptions = MediaOptions()
    server: ServerOptions = ServerOptions()
    register: RegisterOptions = RegisterOptions()


# ── where values come from ───────────────────────────────────────────────────────────────────


def groups() -> dict[str, type[Struct]]:
    """The option groups of Config by field name, in order."""
    return {field.name: field.type for field in msgspec.structs.fields(Config)}


def read_file(path: str) -> dict[str, Any]:
    """The options that a TOML file sets, by field name: at its top level, or in tables named as the option groups.

    Raises ConfigError for a file that cannot be read, an unknown name, or a value that its option does not take."""
    try:
        content = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}; give a TOML file of options") from None
    found: dict[str, Any] = {}
    for name, value in content.items():
        table = value if name in groups() and isinstance(value, dict) else {name: value}
        for key in table.keys() & found.keys():
            raise ConfigError(f"{path} sets {key} twice; keep one")
        found |= table
    by_name = {option.name: option for struct in groups().values() for option in options_of(struct)}
    for name, value in found.items():
        if name not in by_name:
            raise ConfigError(f"{path} sets {name}, which is no option{did_you_mean(name, by_name)}")
        found[name] = by_name[name].read(value, f"{name} in {path}")
    return found


def resolve(
    given: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    file: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Build the Config from `given` (field name to value), then `environ` (ENGINE_*), then `file`, then the defaults.

    Values may be text, as a command line gives them, or typed, as Python code and `read_file` give them.
    Raises ConfigError for a name that is no option and for a value that its option does not take.
    """
    environ = environ or {}
    refuse_unknown(given, environ, groups().values())
    values: dict[str, Any] = {}
    for group, struct in groups().items():
        fields = said(struct, given, environ, file)
        if group == "parallel":
            fields = said_by_launcher(fields.get("launcher", "none"), environ) | fields
            fields = {"tp": max(fields.get("ep", 1), fields.get("dp_attention", 1))} | fields
        values[group] = struct(**fields)
    return Config(**values)


if __name__ == "__main__":
    print(options_page(groups().values(), router_groups().values()), end="")
