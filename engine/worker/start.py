"""How a worker starts: from the names in a configuration to a runner with its weights, its KV cache and its graphs.

Left out: the loop that runs steps then (loop.py), and who starts workers.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from engine.config import Config, ProcessOptions
from engine.errors import ConfigError, counted
from engine.kernels import choose
from engine.layers.build import Build
from engine.layers.model import Model
from engine.messages.control import Boot, WorkerReady
from engine.messages.step import VECTOR, steps_in_flight
from engine.parallel.groups import Groups, join
from engine.parallel.mesh import ALONE, Mesh
from engine.parallel.pipeline import Pipeline, join_stages
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.plugin.specs import Checkpoint, KVSpec
from engine.plugin.terms import LONGEST, Terms, language_terms
from engine.runtime.processors import cores
from engine.runtime.tiers import tier_sizes
from engine.worker.backends import Backends, quantization
from engine.worker.choices import check_sight, model_for
from engine.worker.compiles import tell_of_compiles
from engine.worker.experts import routers_of
from engine.worker.memory import allocate, available_memory, choose_max_model_len, count_pages, state_bytes
from engine.worker.rebalance import most_moved
from engine.worker.runner import Runner
from engine.worker.sampling.grammars import begin_grammars
from engine.worker.sight import Sight, encoder_bytes, sight_of
from engine.worker.steps.copies import Copy
from engine.worker.steps.graphs import most_captured, most_prompt_tokens
from engine.worker.steps.warmup import FILTERED, PENALIZED, PLAIN, everything
from engine.worker.tiers import begin_transfers
from engine.worker.ways import choose_ways, exchange_of
from engine.worker.weights import Tensors, checked_tensors, fill_at_random, load_weights, weight_bytes
from engine.worker.work import attention_work

logger = logging.getLogger("engine.worker")

SMALL_STEP = 16  # tokens of the smallest step that a GPU is warmed up with, and of a row of it
WARM_UP_TOKENS = 16  # on a CPU; a GPU is warmed up with steps of all sizes, the largest of which shows what it takes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows, and tokens, of the largest step; of each copy of attention."""

    slots: int
    step_tokens: int


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_SIZES = Sizes(slots=64, step_tokens=2048)
GPU_SIZES = Sizes(slots=256, step_tokens=8192)


Agree = Callable[[int], int]  # from the pages that this rank has room for to those that every rank allocates


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, and what serves its layers. `limit` is its longest sequence."""

    plugins: Plugins
    checkpoint: Checkpoint
    terms: Terms  # of config.json
    tensors: Tensors  # none where weights are made up
    backends: Backends
    limit: int

    @property
    def language(self) -> Terms:
        """What the terms say of the language model."""
        return language_terms(self.terms)


def start(boot: Boot, import_seconds: float, agree: Agree = lambda pages: pages) -> tuple[Runner, WorkerReady]:
    """Brings up the model that `boot` names. Raises ConfigError or PluginError for what cannot work.

    All ranks of a group go through the same phases in the same order: on the way they run steps, in which ranks wait
    for each other. `agree` waits for all ranks too."""
    config, phases = boot.config, {"import": import_seconds}
    here = boot.world // config.parallel.nnodes  # ranks of this host
    device = choose_device(config.process, rank=boot.rank % here, ranks=here, hosts=config.parallel.nnodes)
    torch.set_num_threads(config.process.threads or max(1, cores() // here))
    with _timed(phases, "checkpoint"):
        source = open_source(config, device)
    sizes = choose_sizes(config, device)
    groups, pipeline = gather_ranks(boot, device, source, sizes, phases)
    with _timed(phases, "weights"):
        build = make_build(config, source, device, groups, sizes)
        model = make_model(source.plugins, source.terms, build)
        check_experts(model, groups)
        beginning = None
        if model.yields != VECTOR and (pipeline is None or pipeline.last):
            beginning = begin_grammars(config, source.plugins, source.checkpoint, model.vocab_size)
        fill(model, config, source.tensors)
    logger.info("%.0f MiB of weights in %s on %s", weight_bytes(model) / 2**20, build.dtype, device)
    with _timed(phases, "grammars"):  # what is left of it
        grammars = None if beginning is None else beginning.ready(sizes.slots, device, build.kernels.logits)
    most = groups.least(min(sizes.step_tokens, most_prompt_tokens(model)))  # as many pay on all ranks
    sight = sight_of(model, config, device, shown_lines(config, sizes, most, build.max_model_len))
    activations = activation_bytes(model, device, sizes, sight, build.max_model_len, phases, pipeline, groups.mesh)
    spec = model.kv_spec()
    with _timed(phases, "kv cache"):
        needs = {"most_tokens": sizes.slots * build.max_model_len, "activation_bytes": activations, "ranks": here}
        pages = agree(count_pages(spec, config.cache, device, weight_bytes(model), slots=sizes.slots, **needs))
        longest = choose_max_model_len(config.model.max_model_len, source.limit, pages * spec.page_size or None)
        runner = Runner(
            model,
            allocate(spec, pages + 1, device),  # one for the padding of CUDA graphs
            device,
            slots=sizes.slots,
            max_model_len=longest,
            page_size=spec.page_size,
            grammars=grammars,
            pipeline=pipeline,
            copy=place_of(groups.mesh, sizes),
            check=groups.check,
        )
    add_tiers(config, source, build, runner, here, phases)
    tell_of_states(spec, sizes.slots)
    with _timed(phases, "warm-up"):
        warm_up(runner, config, pages=pages, step_tokens=most, dtype=build.dtype, attention=source.backends.chosen)
    groups.started()
    return runner, readiness(runner, sizes, sight, pages=pages, attention=source.backends.chosen, phases=phases)


def add_tiers(
    config: Config, source: Source, build: Build, runner: Runner, here: int, phases: dict[str, float]
) -> None:
    """What lies below the caches of `runner`, one of so many ranks `here`, where an option asks for it."""
    if tier_sizes(config.cache) is not None:
        with _timed(phases, "tiers"):
            about = {"mesh": build.mesh, "attention": source.backends.chosen, "dtype": build.dtype}
            about |= {"terms": source.terms, "max_model_len": build.max_model_len}
            runner.transfers = begin_transfers(config, source.plugins, runner, here, **about)


def tell_of_states(spec: KVSpec, slots: int) -> None:
    """Logs what states of requests take, if the model has any."""
    if spec.states:
        kept = f"a copy for a cached prefix takes {counted(spec.state_pages, 'page')}"
        kept = kept if spec.state_pages else "no page holds a copy: cached prefixes are not reused"
        logger.info("%.0f MiB of states of requests; %s", state_bytes(spec, slots) / 2**20, kept)


def place_of(mesh: Mesh, sizes: Sizes) -> Copy | None:
    """Which copy of attention this rank is of, if there are several."""
    return None if mesh.dp == 1 else Copy(mesh.coordinates["dp"], mesh.dp, sizes.slots)


def gather_ranks(
    boot: Boot, device: torch.device, source: Source, sizes: Sizes, phases: dict[str, float]
) -> tuple[Groups, Pipeline | None]:
    """The groups that this rank is in, and its place among the stages, if there are several."""
    if boot.world == 1:
        return Groups.apart(ALONE), None
    with _timed(phases, "ranks"):
        groups = meet(boot, device)
    pipeline = join_stages(groups)
    if device.type == "cuda" and groups.mesh.extent("attention_tp") > 1:
        with _timed(phases, "peers"):
            groups = join_memory(groups, boot.config, source, sizes)
    return groups, pipeline


def open_source(config: Config, device: torch.device) -> Source:
    """The checkpoint that `config` names, its weights looked at but not read."""
    plugins = Plugins.load(config.model.plugins)
    checkpoint = open_checkpoint(plugins, config.model.model)
    terms = Terms(checkpoint.config())
    tensors = checked_tensors(checkpoint, language_terms(terms)) if config.model.load == "auto" else []
    backends = Backends(plugins, device.type)
    return Source(plugins, checkpoint, terms, tensors, backends, _model_limit(language_terms(terms), config))


def meet(boot: Boot, device: torch.device) -> Groups:
    """Joins the other ranks."""
    mesh = boot.config.parallel.mesh(boot.rank)
    logger.info("rank %d of %d, with %s", boot.rank, boot.world, counted(torch.get_num_threads(), "thread"))
    return join(mesh, boot.rendezvous, device)


def join_memory(groups: Groups, config: Config, source: Source, sizes: Sizes) -> Groups:
    """Lets the GPUs of a host write to each other's memory, for sums. It is taken before pages are counted."""
    from engine.parallel.peers import join_peers

    width, dtype = source.language.integer("hidden_size", None), choose_dtype(config, groups.device, source.language)
    group, rows = groups.along("attention_tp"), sizes.step_tokens
    if width is None or (peers := join_peers(group, groups.device, width=width, rows=rows, dtype=dtype)) is None:
        return groups
    found = peers.measure(group, width, rows, dtype, choose(groups.device, dtype).dense)
    if group.place == 0:  # all have agreed on it
        logger.info("sums over %d ranks with the norm behind them: %s", group.size, found)
    return groups.with_peers("attention_tp", peers)


def make_build(config: Config, source: Source, device: torch.device, groups: Groups, sizes: Sizes) -> Build:
    """What the layers are built with."""
    build = Build(
        dtype=choose_dtype(config, device, source.language),
        device=device,
        page_size=config.cache.page_size,
        max_model_len=min(source.limit, config.model.max_model_len or source.limit),
        attention_backend=source.backends.build,
        kv_dtype=torch.float8_e4m3fn if config.cache.kv_dtype == "fp8" else None,
        quantization=quantization(source.plugins, source.terms),
        redundant_experts=config.parallel.redundant_experts,
        deferred=True,
        mesh=groups.mesh,
        groups=groups,
    )
    return replace(build, ways=choose_ways(config.parallel, source, build, sizes.step_tokens))


def fill(model: Model, config: Config, tensors: Tensors) -> None:
    """Gives `model` its weights, or made-up ones."""
    if config.model.load != "auto":
        fill_at_random(model, ties=config.model.load == "dummy-ties")
    else:
        load_weights(model, tensors)


def shown_lines(config: Config, sizes: Sizes, most: int, max_model_len: int) -> int:
    """For how many embeddings captured steps have a place, where `most` tokens of prompts are captured: those of copies
    of attention show nothing."""
    if not config.process.cuda_graphs or config.parallel.dp_attention > 1:
        return 0
    return most_captured(sizes.slots, min(most, sizes.slots * max_model_len))


def warm_up(
    runner: Runner, config: Config, *, pages: int, step_tokens: int, dtype: torch.dtype, attention: str
) -> None:
    """Runs what is slow the first time; on a GPU, captures what can be captured."""
    if runner.device.type == "cpu":
        runner.warm_up(WARM_UP_TOKENS)
        return
    if config.process.cuda_graphs:
        before = available_memory(runner.device)
        if not runner.capture(pages, config.cache.prefix_cache, step_tokens):
            logger.info("no CUDA graphs: attention backend %s cannot be captured", attention)
        left = available_memory(runner.device)
        logger.info("capturing took %d MiB of memory, and %d MiB are left", (before - left) >> 20, left >> 20)
    if runner.grammars is not None:
        runner.grammars.warm_up(dtype)
    tell_of_compiles()


def readiness(
    runner: Runner, sizes: Sizes, sight: Sight, *, pages: int, attention: str, phases: dict[str, float]
) -> WorkerReady:
    """What this rank can do."""
    model, spec, device = runner.model, runner.model.kv_spec(), runner.device
    copies = 1 if runner.copy is None else runner.copy.copies
    return WorkerReady(
        pages=pages,
        page_size=spec.page_size,
        slots=sizes.slots * copies,
        max_step_tokens=sizes.step_tokens,
        max_model_len=runner.tokens.shape[1] - 1,  # a sequence and the token after it
        vocab_size=model.vocab_size,
        kv_bytes_per_token=spec.page_bytes // spec.page_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        attention=attention or "none",
        phases=phases,
        embedding_size=model.embedding_size,
        recurrent=bool(spec.states),
        state_pages=spec.state_pages,
        attention_work=attention_work(model),
        copies=copies,
        mixture=bool(routers_of(model)),
        exchange=exchange_of(model),
        host_pages=0 if runner.transfers is None else runner.transfers.pages,
        stores=runner.transfers is not None and runner.transfers.stores,
        encoder_tokens=sight.step_tokens,
        embeddings=sight.held,
    )


def make_model(plugins: Plugins, terms: Terms, build: Build) -> Model:
    """The model that config.json names, its weights not filled. ConfigError for what its plugin misses there, and
    PluginError where another prepares media that the model does not take."""
    architectures = terms.words("architectures")
    entry = model_for(plugins, architectures)
    model_class = plugins.code("models", entry.name)
    try:
        model: Model = model_class(terms, build).eval()
    except KeyError as error:
        raise ConfigError(f"the model's configuration has no {error}, which the {entry.name} model needs") from None
    check_sight(plugins, entry, architectures, model.sees)
    return model


def check_experts(model: Model, groups: Groups) -> None:
    """Raises ConfigError where experts are to be divided, and no stage of the model has any."""
    if groups.mesh.ep > 1 and groups.least(-len(routers_of(model))) == 0:
        raise ConfigError(
            f"--ep {groups.mesh.ep} divides the experts of a mixture, and {type(model).__name__} has none; leave --ep "
            f"out, or say --tp {groups.mesh.tp}"
        )


def activation_bytes(
    model: Model,
    device: torch.device,
    sizes: Sizes,
    sight: Sight,
    max_model_len: int,
    phases: dict[str, float],
    pipeline: Pipeline | None = None,
    mesh: Mesh = ALONE,
) -> int:
    """Bytes that steps take on a GPU beside weights, pages and states: the largest one, and media. 0 on a CPU, where
    memory is taken when it is written."""
    if device.type == "cpu":
        return 0
    with _timed(phases, "largest step"):
        largest = peak_bytes(model, device, sizes, max_model_len, pipeline, mesh)
        return largest + encoder_bytes(model, device, sight, sizes.step_tokens)


def peak_bytes(
    model: Model,
    device: torch.device,
    sizes: Sizes,
    max_model_len: int,
    pipeline: Pipeline | None = None,
    mesh: Mesh = ALONE,
) -> int:
    """Bytes of activations in the largest step: `step_tokens` of prompts in as many rows as there can be, each of which
    asks for all that can be asked of its logits.

    Runs it on a small cache; what compiles on first use does so here. Each copy of attention has such a step."""
    slots, step_tokens = sizes.slots, sizes.step_tokens
    logger.info(
        "running the largest step, of %s in %s, for the memory that it takes",
        counted(step_tokens, "token"),
        counted(slots, "row"),
    )
    spec = model.kv_spec()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    pages = -(-(min(step_tokens, max_model_len) + 1) // spec.page_size)
    caches = allocate(spec, pages, device)
    runner = Runner(
        model,
        caches,
        device,
        slots=slots,
        max_model_len=max_model_len,
        page_size=spec.page_size,
        pipeline=pipeline,
        copy=place_of(mesh, sizes),
    )
    runner.warm_up(step_tokens, slots, PLAIN if model.yields == VECTOR else everything(model.vocab_size))
    runner.warm_up(step_tokens, 1, FILTERED)
    for sampling in (PENALIZED, PLAIN):
        runner.warm_up(1, 1, sampling)
    tokens = step_tokens // 2
    while tokens >= SMALL_STEP:  # kernels are cut by the size of a step
        runner.warm_up(tokens, min(slots, tokens // SMALL_STEP), PLAIN)
        tokens //= 2
    peak = torch.cuda.max_memory_allocated(device) - before
    if pipeline is not None:  # hidden states on their way, of as many steps as may be in flight
        peak += steps_in_flight(pipeline.group.size) * step_tokens * model.width * model.dtype.itemsize
    peak += most_moved(model)
    return peak - pages * spec.page_bytes - state_bytes(spec, slots)


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - began


def choose_device(options: ProcessOptions, *, rank: int = 0, ranks: int = 1, hosts: int = 1) -> torch.device:
    """The device of a rank, one of `ranks` on this of so many `hosts`, as `options` say. ConfigError where torch sees
    no GPU, or fewer than there are ranks."""
    present = torch.cuda.is_available()
    if options.device == "cuda" and not present:
        raise ConfigError(
            f"--device cuda, but torch {torch.__version__} sees no GPU: install a CUDA build of torch and a driver, "
            "or say --device cpu"
        )
    if not present or options.device == "cpu":
        return torch.device("cpu")
    if (seen := torch.cuda.device_count()) < ranks:
        asked = f"{ranks} ranks (--tp times --pp)" if hosts == 1 else f"{ranks * hosts} ranks over {hosts} hosts"
        raise ConfigError(
            f"{asked} need {ranks} GPUs{' on each' if hosts > 1 else ''}, and torch sees {seen}"
            f"{' on this one' if hosts > 1 else ''}; say --tp and --pp of at most {seen * hosts} ranks"
        )
    device = torch.device("cuda", rank)
    if rank:
        torch.cuda.set_device(device)
    return device


def choose_sizes(config: Config, device: torch.device) -> Sizes:
    """Those that are given, which copies of attention divide; or usual on `device`, for each copy. So a step of as many
    copies as ranks takes a rank as long as one of its own would, and its launches hide behind its kernels."""
    usual, copies = GPU_SIZES if device.type == "cuda" else CPU_SIZES, config.parallel.dp_attention
    return Sizes(
        slots=(config.schedule.max_running or usual.slots * copies) // copies,
        step_tokens=(config.schedule.max_step_tokens or usual.step_tokens * copies) // copies,
    )


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
