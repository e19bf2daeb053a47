"""The device process: starts a model, then runs the steps it is sent, one launched ahead of the one it waits for.

Left out: more than one rank.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import Config, ProcessOptions
from engine.errors import ConfigError
from engine.layers.build import Build
from engine.layers.model import Model
from engine.messages import ToWorker
from engine.messages.assets import DropGrammar, LoadGrammar
from engine.messages.control import Boot, CountExperts, Ping, Pong, Profile, WorkerReady
from engine.messages.step import VECTOR, StepPlan
from engine.parallel.mesh import Mesh
from engine.plugin.registry import Plugins, resolve
from engine.plugin.terms import LONGEST, Terms
from engine.runtime.channel import BlockingFrames
from engine.worker.backends import Backends, quantization
from engine.worker.compiles import tell_of_compiles
from engine.worker.experts import count_experts
from engine.worker.memory import allocate, choose_max_model_len, count_pages
from engine.worker.profiling import StepProfiler
from engine.worker.runner import Runner
from engine.worker.sampling.grammars import begin_grammars
from engine.worker.steps.results import Step
from engine.worker.steps.warmup import FILTERED, PENALIZED, PLAIN, everything
from engine.worker.weights import checked_tensors, fill_at_random, load_weights, weight_bytes

logger = logging.getLogger("engine.worker")

GLANCE = 5e-5  # seconds between two looks at the device, while a step runs and no plan has come
SMALL_STEP = 16  # tokens of the smallest step that a GPU is warmed up with, and of a row of it
WARM_UP_TOKENS = 16  # on a CPU; a GPU is warmed up with steps of all sizes, the largest of which shows what it takes


@dataclass(frozen=True, slots=True)
class Defaults:
    """What --max-running and --max-step-tokens are where they are not given."""

    slots: int
    step_tokens: int


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_DEFAULTS = Defaults(slots=64, step_tokens=2048)
GPU_DEFAULTS = Defaults(slots=256, step_tokens=8192)


def serve(frames: BlockingFrames[ToWorker], runner: Runner) -> None:
    """Runs steps until the peer closes.

    A result is sent as soon as it is there, and a plan launched as soon as it comes: so the device goes from one step
    to the next without a gap. A plan whose rows follow a grammar has the results before it sent while its model runs:
    what makes their masks is what others need to plan on.
    """
    in_flight: deque[Step] = deque()
    profiler = StepProfiler(runner.device)

    def finish_first() -> None:
        with profiler.finishing():
            frames.send(runner.finish(in_flight.popleft()))

    def catch_up() -> None:
        while in_flight:
            finish_first()

    while True:
        while in_flight:
            if in_flight[0].ready():
                finish_first()
            elif frames.waiting(GLANCE):
                break
        message = frames.receive()
        match message:
            case StepPlan():
                with profiler.launching(message):
                    in_flight.append(runner.launch(message, catch_up))
            case LoadGrammar():
                assert runner.grammars is not None, "requests with a grammar are let in only where there are engines"
                runner.grammars.load(message, frames.send)
            case DropGrammar():
                assert runner.grammars is not None
                runner.grammars.drop(message.number)
            case Profile():
                frames.send(profiler.answer(message, len(in_flight)))
            case CountExperts():
                frames.send(count_experts(runner.model, message))
            case Ping():
                frames.send(Pong())
            case None:
                return
            case _:
                raise AssertionError(f"a worker that runs got {type(message).__name__}")


def start(boot: Boot, import_seconds: float) -> tuple[Runner, WorkerReady]:
    """Brings up the model that `boot` names. Raises ConfigError or PluginError for what cannot work."""
    assert boot.world == 1, "more than one rank is not built yet"
    config = boot.config
    phases = {"import": import_seconds}
    device = choose_device(config.process)
    torch.set_num_threads(config.process.threads or physical_cores())
    with _timed(phases, "checkpoint"):
        plugins = Plugins.load(config.model.plugins)
        checkpoint = plugins.open_checkpoint(config.model.model)
        terms = Terms(checkpoint.config())
        tensors = checked_tensors(checkpoint, terms) if config.model.load == "auto" else []
        backends = Backends(plugins, device.type)
    with _timed(phases, "weights"):
        limit = _model_limit(terms, config)
        build = Build(
            dtype=choose_dtype(config, device, terms),
            device=device,
            page_size=config.cache.page_size,
            max_model_len=min(limit, config.model.max_model_len or limit),
            attention_backend=backends.build,
            mesh=Mesh(boot.rank, tp=boot.world),
            kv_dtype=torch.float8_e4m3fn if config.cache.kv_dtype == "fp8" else None,
            quantization=quantization(plugins, terms),
            deferred=True,
        )
        model = make_model(plugins, terms, build)
        grammars = None if model.yields == VECTOR else begin_grammars(config, plugins, checkpoint, model.vocab_size)
        if config.model.load != "auto":
            fill_at_random(model, ties=config.model.load == "dummy-ties")
        else:
            load_weights(model, tensors)
    logger.info("%.0f MiB of weights in %s on %s", weight_bytes(model) / 2**20, build.dtype, device)
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    slots = config.schedule.max_running or defaults.slots
    step_tokens = config.schedule.max_step_tokens or defaults.step_tokens
    with _timed(phases, "grammars"):  # what is left of it
        ready_grammars = None if grammars is None else grammars.ready(slots, device, build.kernels.logits)
    spec, activations = model.kv_spec(), 0
    if device.type == "cuda":
        logger.info(
            "running the largest step, of %d tokens in %d rows, for the memory that it takes", step_tokens, slots
        )
        with _timed(phases, "largest step"):
            activations = peak_bytes(model, device, slots, min(limit, build.max_model_len), step_tokens)
    with _timed(phases, "kv cache"):
        most_tokens = slots * build.max_model_len
        pages = count_pages(spec, config.cache, device, weight_bytes(model), most_tokens, activations)
        cache_tokens = pages * spec.page_size if spec.groups else None
        max_model_len = choose_max_model_len(config.model.max_model_len, limit, cache_tokens)
        caches = allocate(spec, pages + 1, device)  # one for the padding of CUDA graphs
        runner = Runner(
            model,
            caches,
            device,
            slots=slots,
            max_model_len=max_model_len,
            page_size=spec.page_size,
            grammars=ready_grammars,
        )
    with _timed(phases, "warm-up"):
        if device.type == "cpu":
            runner.warm_up(WARM_UP_TOKENS)
        elif config.process.cuda_graphs and not runner.capture(pages, config.cache.prefix_cache, step_tokens):
            logger.info("no CUDA graphs: attention backend %s cannot be captured", backends.chosen)
        if device.type == "cuda" and ready_grammars is not None:
            ready_grammars.warm_up(build.dtype)
    if device.type == "cuda":
        tell_of_compiles()
    ready = WorkerReady(
        pages=pages,
        page_size=spec.page_size,
        slots=slots,
        max_step_tokens=step_tokens,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        kv_bytes_per_token=spec.page_bytes // spec.page_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        attention=backends.chosen or "none",
        phases=phases,
        embedding_size=model.embedding_size,
    )
    return runner, ready


def make_model(plugins: Plugins, terms: Terms, build: Build) -> Model:
    """The model that config.json names, its weights not filled. ConfigError for what its plugin misses there."""
    entry = plugins.model_for(terms.words("architectures"))
    model_class = resolve(entry.target)
    try:
        model: Model = model_class(terms, build).eval()
    except KeyError as error:
        raise ConfigError(f"the model's configuration has no {error}, which the {entry.name} model needs") from None
    return model


def peak_bytes(model: Model, device: torch.device, slots: int, max_model_len: int, step_tokens: int) -> int:
    """Bytes of activations in the largest step: `step_tokens` of prompts in as many rows as there can be, each of which
    asks for all that can be asked of its logits.

    Runs it on a small cache; what compiles on first use does so here."""
    spec = model.kv_spec()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    pages = -(-(min(step_tokens, max_model_len) + 1) // spec.page_size)
    caches = allocate(spec, pages, device)
    runner = Runner(model, caches, device, slots=slots, max_model_len=max_model_len, page_size=spec.page_size)
    runner.warm_up(step_tokens, slots, PLAIN if model.yields == VECTOR else everything(model.vocab_size))
    runner.warm_up(step_tokens, 1, FILTERED)
    for sampling in (PENALIZED, PLAIN):
        runner.warm_up(1, 1, sampling)
    tokens = step_tokens // 2
    while tokens >= SMALL_STEP:  # kernels are cut by the size of a step
        runner.warm_up(tokens, min(slots, tokens // SMALL_STEP), PLAIN)
        tokens //= 2
    peak = torch.cuda.max_memory_allocated(device) - before
    return peak - pages * spec.page_bytes


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - began


def choose_device(options: ProcessOptions) -> torch.device:
    """The device that `options` name; ConfigError for a GPU where torch sees none."""
    present = torch.cuda.is_available()
    if options.device == "cuda" and not present:
        raise ConfigError(
            f"--device cuda, but torch {torch.__version__} sees no GPU: install a CUDA build of torch and a driver, "
            "or say --device cpu"
        )
    return torch.device("cuda", 0) if present and options.device != "cpu" else torch.device("cpu")


def choose_dtype(config: Config, device: torch.device, terms: Terms) -> torch.dtype:
    """The type of weights and activations. `terms` are those of config.json."""
    name: str = config.model.dtype
    if name == "auto":
        said = terms.word("dtype", None) or terms.word("torch_dtype", "bfloat16")
        name = "float32" if device.type == "cpu" else said
    if name not in DTYPES:
        raise ConfigError(f"the checkpoint's dtype {name!r} is not known; say --dtype bfloat16, float16 or float32")
    return DTYPES[name]


def _model_limit(terms: Terms, config: Config) -> int:
    places = terms.integer("max_position_embeddings", None, high=LONGEST)
    trained = terms.section("pooling").integer("max_seq_length", None, high=LONGEST)  # of an encoder, may be less
    limits = [limit for limit in (trained, places) if limit is not None]
    if limits:
        return min(limits)
    if config.model.max_model_len is None:
        raise ConfigError("the model's configuration has no max_position_embeddings; say --max-model-len")
    return config.model.max_model_len


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once: matrix units are shared between them."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    return len(cores)
