"""Every struct that crosses a channel, and nothing else.

Structs are frozen, tagged and `array_like`, so a frame is a short msgpack array. Columns of numbers
travel as the bytes of little-endian int32 (`ids`) or float32 arrays: one copy, no per-number cost.

    http ──Generate/Embed──> tokenizer ──Open──> detokenizer ──Chunks──> http
                                │Admit/Abort        ^      │StopHit
                                v                   │Tokens v
                             scheduler ─────────────┘<──────┘
                                │ ^                 ──Stats/Flushed/Paused/Profiled/ExpertCounts/Fatal──> http
   StepPlan/Profile/CountExperts/Reset│ │StepDone, Profiled, ExpertCounts, WorkerReady, WorkerLost, …
                                v │
                             executor <──frames──> worker

A long text goes from the tokenizer, and from http, to a text process (TextWork; Prepared, Tokenized, Detokenized).
A grammar goes from the scheduler to the compiler (Compile, Compiled), then to the worker (LoadGrammar, GrammarLoaded),
and then its requests run.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from engine.config import Config


class Message(Struct, frozen=True, array_like=True, tag=True):
    """Base of what is sent on its own; the class name is the tag."""


class Part(Struct, frozen=True, array_like=True):
    """Base of what travels inside a message."""


# ── a request on its way in ──────────────────────────────────────────────────────────────────


GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "lark", "choice", "structural_tag"]


class Grammar(Part, frozen=True):
    """What a reply must be. Two that are equal are compiled once, so `source` is text whatever the kind: JSON for a
    schema, a structural tag and a choice (a list of strings), nothing for json_object.

    With `after` the reply is free until that text has come (the end of the reasoning), and the grammar begins behind
    it. `strict`, of a schema: no property and no item that it does not name. `beside` is what else the client asked
    for, where this was put together of that and of its tools: so a refusal can tell the two apart. `tools` are their
    names, in the order of their schemas in `source`.
    """

    kind: GrammarKind
    source: str = ""
    after: str = ""
    strict: bool = True
    beside: "Grammar | None" = None
    tools: tuple[str, ...] = ()


class SamplingParams(Part, frozen=True, kw_only=True):
    """How one request is sampled and when it ends, as its client says it; bounds are in engine/sampling.py."""

    # None: the default of the model, or of the API (engine.sampling.SamplingDefaults).
    temperature: Annotated[float | None, Meta(description="0 is greedy, 1 the model's own distribution")] = None
    top_p: Annotated[
        float | None, Meta(description="keep the likeliest tokens of this total probability; 1 is off")
    ] = None
    top_k: Annotated[int | None, Meta(description="keep this many of the likeliest tokens; 0 or -1 is off")] = None
    min_p: Annotated[
        float | None, Meta(description="keep tokens at least this share as likely as the best; 0 is off")
    ] = None
    seed: Annotated[int | None, Meta(description="the same seed samples the same reply; default: a fresh one")] = None
    max_tokens: Annotated[int | None, Meta(description="longest reply; default: what the model's length leaves")] = None
    stop: Annotated[tuple[str, ...], Meta(description="a string that ends the reply and is not part of it")] = ()
    stop_token_ids: Annotated[tuple[int, ...], Meta(description="a token id that ends the reply")] = ()
    ignore_eos: Annotated[bool, Meta(description="run on past the model's own end tokens")] = False
    stop_regex: Annotated[tuple[str, ...], Meta(description="a regular expression that ends the reply")] = ()
    min_tokens: Annotated[int, Meta(description="shortest reply: nothing stops it before")] = 0
    presence_penalty: Annotated[float, Meta(description="taken from the logit of what the reply has said")] = 0.0
    frequency_penalty: Annotated[float, Meta(description="the same, for each time it was said")] = 0.0
    repetition_penalty: Annotated[
        float | None, Meta(description="makes what prompt or reply hold less likely, above 1; 1 is off")
    ] = None
    logit_bias: Annotated[dict[int, float], Meta(description="added to logits: token id to bias, as JSON")] = {}
    bad_words: Annotated[tuple[str, ...], Meta(description="a text that the reply must not hold")] = ()
    allowed_token_ids: Annotated[tuple[int, ...], Meta(description="a token id to sample; others are not")] = ()
    logprobs: Annotated[
        int | None, Meta(description="log-probabilities of the reply's tokens, and of so many likeliest ones")
    ] = None
    prompt_logprobs: Annotated[int | None, Meta(description="the same for the prompt's tokens")] = None
    skip_special_tokens: Annotated[bool, Meta(description="leave special tokens out of the text")] = True
    include_stop_str_in_output: Annotated[
        bool, Meta(description="end the text with what stopped it, a special token too if these are not skipped")
    ] = False
    detokenize: Annotated[bool, Meta(description="make text of the tokens; without, there are only ids")] = True
    json_object: Annotated[bool, Meta(description="the reply is a JSON object")] = False
    json_schema: Annotated[str | None, Meta(description="the reply is JSON of this JSON schema")] = None
    regex: Annotated[str | None, Meta(description="the reply matches this regular expression, from end to end")] = None
    ebnf: Annotated[str | None, Meta(description="the reply is of this grammar, in EBNF (GBNF), from `root`")] = None
    lark: Annotated[str | None, Meta(description="the reply is of this grammar, in Lark's syntax, from `start`")] = None
    choice: Annotated[tuple[str, ...], Meta(description="a text that the reply may be; it is one of them")] = ()
    structural_tag: Annotated[str | None, Meta(description="which parts of the reply have a grammar, as JSON")] = None
    strict_schema: Annotated[
        bool, Meta(description="the reply has no property that the JSON schema does not name, though it may allow them")
    ] = True


class Generate(Message, frozen=True):
    """http → tokenizer: one request; exactly one of `text`, `ids` (int32) and `messages` is set.

    Where `sampling.max_tokens` is None, `default_max_tokens` bounds the reply if there is that much room; where that is
    None too, the model's own default does. Requests
    share cached prefixes with those of the same `cache_salt` alone. With `echo` the reply's text begins with the
    prompt. A `grammar` takes the place of what `sampling` says of one: for what clients ask for in other words, as a
    tool to be called.
    """

    rid: str
    sampling: SamplingParams
    text: str | None = None
    ids: bytes | None = None
    messages: list[dict[str, Any]] | None = None
    priority: int = 0
    default_max_tokens: int | None = None
    # How the chat template writes `messages`: see Text.render_chat.
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] | None = None
    cache_salt: str = ""
    echo: bool = False
    chat_template: str | None = None  # in the place of the model's own
    grammar: Grammar | None = None
    tools: list[dict[str, Any]] | None = None  # that the chat template describes, as OpenAI writes them
    opening: str = ""  # of the reply, put behind the prompt of `messages` and not part of the reply's text
    show_marks: bool = False  # leave those special tokens in the text that the parsers look for
    special: bool | None = None  # add the tokenizer's special tokens to the prompt; None: to `text`, not to `messages`
    last: int | None = None  # keep only so many tokens of the prompt, its last; -1: as many as there is room for
    tell_prompt: bool = False  # the ids of the prompt's tokens


class Embed(Message, frozen=True):
    """http → tokenizer: make a vector of one prompt; exactly one of `text` and `ids` (int32) is set. `first` keeps only
    so many tokens of it, its first; -1: as many as the model takes."""

    rid: str
    text: str | None = None
    ids: bytes | None = None
    priority: int = 0
    first: int | None = None


class Prepare(Message, frozen=True):
    """anyone → text process: render and tokenize this request for a model of that length and vocabulary."""

    job: "Generate | Embed"
    max_model_len: int
    vocab_size: int


class Tokenize(Message, frozen=True):
    """anyone → text process: the token ids of `text`, or of `messages` as the chat template writes them with `options`
    (those of Text.render_chat). More than `most` tokens are refused; with `names` each token's text is told as well."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    options: dict[str, Any] = {}
    special: bool = False
    names: bool = False
    most: int = 1 << 20


class Detokenize(Message, frozen=True):
    """anyone → text process: the text of `ids` (int32)."""

    ids: bytes
    skip_special_tokens: bool = False


class TextWork(Message, frozen=True):
    """text pool → text process: a Prepare, a Tokenize or a Detokenize, as msgpack; or as JSON if it has whole numbers
    beyond 64 bits, which a client's schemas may have and msgpack has not."""

    packed: bytes
    is_json: bool = False


class Prepared(Message, frozen=True):
    """text process → whoever asked: the answer to a Prepare."""

    opened: "Open"
    admitted: "Admit"


class Tokenized(Message, frozen=True):
    """text process → whoever asked: the answer to a Tokenize; `ids` are int32."""

    ids: bytes
    names: list[str] | None = None


class Detokenized(Message, frozen=True):
    """text process → whoever asked: the answer to a Detokenize."""

    text: str


class Retired(Message, frozen=True):
    """text process → text pool: its last answer has grown it so that another process shall take its place."""


class Open(Message, frozen=True):
    """tokenizer → detokenizer: tokens of `rid` will come; turn them into text until one of `stop` or `stop_regex`.

    Neither is looked for in the first `min_tokens` tokens. `echo` goes before the reply's text. `prompt` (int32) is
    there where the prompt's log-probabilities are asked for; `prompt_only` says that no token of the reply is. The
    next three fields are those of SamplingParams, and `show_marks` is Generate's. `prompt_ids` (int32) are there where
    the prompt's ids are asked for.
    """

    rid: str
    prompt_tokens: int
    stop: tuple[str, ...]
    stop_regex: tuple[str, ...] = ()
    min_tokens: int = 0
    echo: str = ""
    prompt: bytes | None = None
    prompt_only: bool = False
    skip_special_tokens: bool = True
    include_stop: bool = False
    detokenize: bool = True
    show_marks: bool = False
    prompt_ids: bytes = b""


class Sampling(Part, frozen=True):
    """What the device needs to sample one row. `seed` is always set; `top_k` 0 is off.

    All ids are int32. `stop_ids` are not sampled before `min_tokens`; of each of `bad_words`, the last token not
    after the ones before it; nothing but `allowed_ids`, if there are any. `logprobs` and `prompt_logprobs` are how
    many of the likeliest tokens to report beside a token's own log-probability; -1 is none at all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias_ids: bytes = b""
    biases: bytes = b""  # float32
    min_tokens: int = 0
    stop_ids: bytes = b""
    bad_words: tuple[bytes, ...] = ()
    allowed_ids: bytes = b""
    logprobs: int = -1
    prompt_logprobs: int = -1


class Admit(Message, frozen=True):
    """tokenizer → scheduler: a checked request. `ids` is int32; `max_new` 0 asks for a vector in place of tokens."""

    rid: str
    ids: bytes
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new: int
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None


class Abort(Message, frozen=True):
    """http → tokenizer → scheduler: end `rid` now, freeing its pages; unknown ids are ignored."""

    rid: str


class StopHit(Message, frozen=True):
    """detokenizer → scheduler: a stop string ended `rid` after `keep` tokens; nobody waits for more."""

    rid: str
    keep: int


# ── one step of the device ───────────────────────────────────────────────────────────────────


class SlotAdmit(Part, frozen=True):
    """A request takes device row `slot`: its tokens so far (int32), of which `prompt_len` are its prompt, and how to
    sample it. If its prompt's log-probabilities are asked for, those of its first `scored` + 1 tokens are known.
    `grammar` is the number of a LoadGrammar; 0 is none. It begins behind the text `after` (see Grammar)."""

    slot: int
    ids: bytes
    sampling: Sampling
    prompt_len: int = 0
    scored: int = 0
    grammar: int = 0
    after: str = ""


class StepPlan(Message, frozen=True):
    """scheduler → every rank: all that one step needs, in the order it is applied.

    `admits`, then `pages` (int32 [n, 3]: slot, index in the slot's page list, page), then `copies`
    (int32 [n, 2]: source page, destination page), then the forward pass over `rows` (int32 [n, 4]:
    slot, start position, length, and what comes of it: 0 nothing, 1 its last position is sampled, 2 its
    positions, all there are, become one vector).
    Steps run on the device in the order sent, so a page freed by step n may be written by step n+1.
    """

    step: int
    rows: bytes
    admits: tuple[SlotAdmit, ...] = ()
    pages: bytes = b""
    copies: bytes = b""


class Logprobs(Part, frozen=True):
    """Log-probabilities of n successive tokens of one row, in the model's own distribution: before temperature,
    penalties, biases and filters. `ranks` says how likely each was, 1 the likeliest; then the k likeliest."""

    row: int
    logprobs: bytes  # float32 [n]
    ranks: bytes  # int32 [n]
    top_ids: bytes = b""  # int32 [n, k]
    top_logprobs: bytes = b""  # float32 [n, k]


class StepDone(Message, frozen=True):
    """rank 0 → scheduler: `counts` (int32) tokens for each sampled row in plan order, `tokens` flat.

    A count may exceed one (speculation). `seconds` is the step's time on the device, `idle` the time that the device
    waited between this step and the one before, where this one was sent before that was over. `logprobs` has an entry
    for each sampled row that asks, its `row` counted among the sampled ones. `prompt_logprobs` has one for each of all
    the plan's rows that computes prompt positions p not scored yet: it holds those of the tokens at p + 1. `vectors`
    (float32 [n, size]) are those of the rows that ask for one, in plan order. `stuck` names sampled rows that cannot go
    on, each with a sentence for its client; their count is 0.
    """

    step: int
    counts: bytes
    tokens: bytes
    seconds: float
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    idle: float = 0.0
    vectors: bytes = b""
    stuck: tuple[tuple[int, str], ...] = ()


class Finish(Part, frozen=True):
    """Row `row` of a `Tokens` has ended; `matched` is the stop token id, where one ended it."""

    row: int
    reason: Literal["stop", "length", "abort"]
    matched: int | None = None


class Tokens(Message, frozen=True):
    """scheduler → detokenizer: the new tokens of a step; row i is `rids[i]` with `counts[i]` tokens.

    `cached` names, for rows whose first token this is, how many prompt tokens the cache held. With the first token
    come the `prompt_logprobs`, where asked for: those of all prompt tokens but the first, which has none. `vectors`
    are float32, by row.
    """

    step: int
    rids: list[str]
    counts: bytes
    tokens: bytes
    finishes: tuple[Finish, ...] = ()
    cached: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    vectors: tuple[tuple[int, bytes], ...] = ()


# ── grammars ─────────────────────────────────────────────────────────────────────────────────


class Compile(Message, frozen=True):
    """scheduler → compiler: a grammar that a request waits for, and how many tokens the model has. Numbers begin with 1
    and are not used again."""

    number: int
    grammar: Grammar
    vocab_size: int


class Compiled(Message, frozen=True):
    """compiler → scheduler: what became of it, after `seconds`: what `engine` packed of `grammar`, as that was given
    to it, or the error of all that wait (fields as in RequestError; `param` is "grammar", or "format" where what is
    refused is what stands beside a grammar's tools). `lasting` says that it would be the same again."""

    number: int
    seconds: float
    engine: str = ""
    grammar: Grammar | None = None
    packed: bytes = b""
    status: int = 0
    code: str = ""
    cause: str = ""
    lasting: bool = True
    param: str = "grammar"


class LoadGrammar(Message, frozen=True):
    """scheduler → rank 0: get this ready for rows that come with its number; see Compiled."""

    number: int
    engine: str
    grammar: Grammar
    packed: bytes


class GrammarLoaded(Message, frozen=True):
    """rank 0 → scheduler: it is ready, or it cannot be, for a reason."""

    number: int
    cause: str = ""


class DropGrammar(Message, frozen=True):
    """scheduler → rank 0: no row will come with this number again."""

    number: int


# ── a reply on its way out ───────────────────────────────────────────────────────────────────


class TokenLogprob(Part, frozen=True):
    """One token and its log-probability, None for the first of a prompt. `text` is its bytes as UTF-8, U+FFFD where
    they are not; `top` are the likeliest at its place, with ranks from 1."""

    id: int
    text: str
    bytes: bytes
    logprob: float | None
    rank: int = 0
    top: "tuple[TokenLogprob, ...]" = ()


class Chunk(Part, frozen=True):
    """New text and token ids of `rid`; the last chunk has a `finish` reason.

    `matched` is the stop string, the stop expression or the stop token id that ended the reply. Token counts are of
    the request so far. `ids` includes the stop token; `text` includes what stopped it only if that is asked for.
    `logprobs`, where asked for, go with `ids`; `prompt_logprobs` and `prompt_ids` (int32) come with the first token.
    The one chunk of an Embed holds its `vector` (float32), unless it was aborted.
    """

    rid: str
    text: str
    ids: list[int]
    finish: Literal["stop", "length", "abort"] | None = None
    matched: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    vector: bytes = b""
    prompt_ids: bytes = b""


class Chunks(Message, frozen=True):
    """detokenizer → http: what one step has to say to its clients."""

    chunks: list[Chunk]


class Failed(Message, frozen=True):
    """anyone → detokenizer → http: `rid` ends with an error of its own (fields as in RequestError)."""

    rid: str
    status: int
    code: str
    message: str
    param: str | None = None


# ── the worker's life, control and observation ───────────────────────────────────────────────


class WorkerReady(Message, frozen=True):
    """worker → scheduler: what the device can hold, and how the start went.

    `pages` of `page_size` tokens; a step takes `max_step_tokens`; `phases` maps a start-up phase to its seconds.
    A model that makes vectors of `embedding_size` generates no text; of others it is 0. `modules` are those that this
    start imported, for a spare worker: the executor keeps them to itself.
    """

    pages: int
    page_size: int
    slots: int
    max_step_tokens: int
    max_model_len: int
    vocab_size: int
    kv_bytes_per_token: int
    device: str
    attention: str
    phases: dict[str, float]
    embedding_size: int = 0
    modules: tuple[str, ...] = ()


class WorkerLost(Message, frozen=True):
    """executor → scheduler: the device process is gone; `cause` says why, for people.

    The executor waits for a Reset before it starts another, so no plan of the old life reaches the new one.
    """

    cause: str


class WorkerSilent(Message, frozen=True):
    """executor → scheduler: no word from the device process for `seconds`; 0 means it answers again."""

    seconds: float


class Reset(Message, frozen=True):
    """scheduler → executor: every plan before this one was for a worker that is gone."""


class Flush(Message, frozen=True):
    """http → scheduler: forget every cached prefix that no running request uses. The answer has the same `number`."""

    number: int


class Flushed(Message, frozen=True):
    """scheduler → http: the answer to a Flush: pages freed, and pages still in use."""

    number: int
    freed: int
    in_use: int


class Pause(Message, frozen=True):
    """http → scheduler: plan no new steps, or go on; requests stay open and new ones wait. Numbered as a Flush.

    `retract` sends those that run back to the queue, so that they hold no page while it is paused."""

    number: int
    paused: bool
    retract: bool = False


class Paused(Message, frozen=True):
    """scheduler → http: the answer to a Pause; if `paused`, nothing runs on the device any more."""

    number: int
    paused: bool


class Profile(Message, frozen=True):
    """http → scheduler → executor → worker: trace the steps launched from now on, or end that. Numbered as a Flush.

    With a `folder` a trace begins, which goes into a new file there after `steps` steps; without, it ends now.
    """

    number: int
    folder: str = ""
    steps: int = 0


class Profiled(Message, frozen=True):
    """worker → executor → scheduler → http: the answer to a Profile: where the trace is, or is to be.

    Or its `cause` says why there is none."""

    number: int
    path: str = ""
    cause: str = ""


CountAction = Literal["start", "stop", "look"]


class CountExperts(Message, frozen=True):
    """http → scheduler → executor → worker: count how often each expert is chosen, from nothing on; end that; or only
    look. Numbered as a Flush."""

    number: int
    action: CountAction


class ExpertCounts(Message, frozen=True):
    """worker → executor → scheduler → http: the answer to a CountExperts; or its `cause` says why there is none.

    `counts` (int64 [layers, experts]) are of those layers that have experts, whose numbers `layers` are.
    """

    number: int
    counting: bool = False
    layers: tuple[int, ...] = ()
    counts: bytes = b""
    cause: str = ""


class Boot(Message, frozen=True):
    """executor → worker: the first frame; the worker loads the model named in `config`."""

    config: Config
    rank: int = 0
    world: int = 1


class Preload(Message, frozen=True):
    """executor → worker, before its Boot: import what a worker imports, then `modules` in their order, and answer with
    a Pong. A `spare` does so at a low priority, as nobody waits for it yet."""

    config: Config
    modules: tuple[str, ...] = ()
    spare: bool = True


class TextBoot(Message, frozen=True):
    """text pool → text process: the first frame; `template` takes the place of the model's own chat template."""

    config: Config
    template: str | None = None


class Ping(Message, frozen=True):
    """executor → worker, when idle: are you there?"""


class Pong(Message, frozen=True):
    """worker → executor: yes."""


class Fatal(Message, frozen=True):
    """`actor` cannot go on; `cause` is a sentence that clients may read, `details` a traceback for the log."""

    actor: str
    cause: str
    details: str = ""


class Stats(Message, frozen=True):
    """scheduler → http: the heartbeat of the core, every second and when work ends.

    Counters (`*_total`, `steps`) only grow. `step_seconds` holds float32 device times of the steps since the last
    Stats; `idle_seconds_total` sums what the device waited for the host between them; `compile_seconds` (float32) are
    those of the grammars compiled since then. `worker` is the state of the device process; `paused` is as the last
    Pause said. `restarts_total` counts workers that took the place of one that died, the last of them after
    `restart_seconds`.
    """

    worker: Literal["starting", "ready", "restarting", "stalled", "failed"]
    cause: str = ""
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    retractions_total: int = 0
    steps: int = 0
    step_seconds: bytes = b""
    paused: bool = False
    idle_seconds_total: float = 0.0
    compile_seconds: bytes = b""
    restarts_total: int = 0
    restart_seconds: float = 0.0


Job = Generate | Embed
TextJob = Prepare | Tokenize | Detokenize
TextAnswer = Prepared | Tokenized | Detokenized
ToTextProcess = TextBoot | TextWork
FromTextProcess = TextAnswer | Failed | Retired | Fatal
ToTokenizer = Job | Abort | WorkerReady
ToTheDevice = Profile | CountExperts  # questions of http's that the worker answers
FromTheDevice = Profiled | ExpertCounts
ToWorker = Boot | Preload | StepPlan | LoadGrammar | DropGrammar | ToTheDevice | Ping
FromWorker = WorkerReady | StepDone | GrammarLoaded | FromTheDevice | Pong | Fatal
FromFront = Admit | Abort | StopHit | Flush | Pause | ToTheDevice
FromExecutor = StepDone | GrammarLoaded | FromTheDevice | WorkerReady | WorkerLost | WorkerSilent | Fatal
ToScheduler = FromFront | FromExecutor | Compiled
ToExecutor = StepPlan | LoadGrammar | DropGrammar | ToTheDevice | Reset
ToDetokenizer = Open | Tokens | Failed
ToFront = Tokens | Failed | Stats | Flushed | Paused | FromTheDevice | WorkerReady | Fatal
ToHttp = Chunks | Failed | Stats | Flushed | Paused | FromTheDevice | WorkerReady | Fatal
