"""What a trace says of a request: its replies are followed here, without OpenTelemetry, which `otlp` alone imports.

A request that is traced has a `Trace` in `TRACE`. Its times are those that the metrics take of each reply anyway, so
nothing is done for a token. Attributes have the names of OpenTelemetry's semantic conventions: `gen_ai.*` where those
have one, in the engine's words otherwise. Left out: prompts and replies, which never go into a span.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from time import perf_counter
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

from engine.errors import ConfigError, RequestError
from engine.messages.reply import Chunk
from engine.messages.request import Generate, Job
from engine.params.sampling import SamplingParams

PROVIDER = "actorserve"  # the provider of the model, and the service, in words of OpenTelemetry
TRACES_PATH = "/v1/traces"
LONGEST = 200  # characters of what a client says that an attribute keeps
Value = str | int | float | bool | list[str]
# The routes whose requests are traced, and what OpenTelemetry calls that which they do.
OPERATIONS: Mapping[str, str] = MappingProxyType(
    {
        "/v1/chat/completions": "chat",
        "/v1/completions": "text_completion",
        "/v1/responses": "chat",
        "/v1/messages": "chat",
        "/generate": "text_completion",
        "/v1/embeddings": "embeddings",
        "/v1/score": "score",
        "/score": "score",
        "/v1/rerank": "rerank",
        "/v2/rerank": "rerank",
        "/rerank": "rerank",
    }
)
# Sampling fields that conventions name, where a request sets them.
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")
NOTHING = SamplingParams()


class Phase(NamedTuple):
    """A part of a request's life, in seconds as perf_counter has them."""

    name: str
    start: float
    end: float


class ReplyTrace:
    """One reply of a traced request; the times are perf_counter's, None for what did not come."""

    __slots__ = ("_trace", "cause", "ended", "first", "last", "last_chunk", "prefill", "prompt", "start")

    def __init__(self, prompt: int, trace: "Trace") -> None:
        self.prompt = prompt  # its number among those of the request
        self.start = perf_counter()
        self.first: float | None = None  # when the first token came
        self.last = self.ended = self.start  # when the last one did, and the end
        self.prefill: float | None = None  # seconds up to the first token from when it was first computed
        self.last_chunk: Chunk | None = None
        self.cause = ""  # of its failure
        self._trace: Trace | None = trace  # until the end: no circle is left for the garbage collector

    def fail(self, error: Exception) -> None:
        """Keep what kind of error ends it; the error itself would hold the whole request."""
        self.cause = error.code if isinstance(error, RequestError) else type(error).__name__

    def end(self, chunk: Chunk | None, times: tuple[float | None, float], prefill: float | None) -> None:
        """It is over: its last chunk, when its first and its last token came, and the seconds of its prefill."""
        self.last_chunk, self.prefill = chunk, prefill
        self.first, self.last = times
        self.ended = perf_counter()
        trace, self._trace = self._trace, None
        if trace is not None and trace.answered:
            trace.late()


class Trace:
    """What one request came to so far."""

    def __init__(self, operation: str, served: str) -> None:
        self.operation = operation
        self.served = served  # the name of the model in replies
        self.answered = False
        self.model: str | None = None  # that the client asked for
        self.id = ""  # of the reply, as the client gets it
        self.samples = 1  # replies to each prompt
        self.streamed = False
        self.replies: list[ReplyTrace] = []
        self.began = perf_counter()
        self._sampling: dict[str, Value] = {}

    def reply(self, job: Job) -> ReplyTrace:
        """A reply that begins now. Those to one prompt follow each other."""
        if isinstance(job, Generate) and not self.replies:
            given = {name: getattr(job.sampling, name) for name in SAMPLING}
            self._sampling = {
                f"gen_ai.request.{name}": value for name, value in given.items() if value != getattr(NOTHING, name)
            }
        self.replies.append(made := ReplyTrace(len(self.replies) // self.samples, self))
        return made

    def late(self) -> None:
        """A reply has ended once the request is answered: it went on in the background."""

    @property
    def cause(self) -> str:
        """The error that ended a reply, if one did."""
        return next((reply.cause for reply in self.replies if reply.cause), "")

    def phases(self) -> list[Phase]:
        """`queue`, then from the first place in a step `prefill`, and from the first token `decode`; of several replies
        from the first to begin to the last to end. Before its first token a request has `queue` alone."""
        if not self.replies:
            return []
        start = min(reply.start for reply in self.replies)
        firsts = [(reply.first, reply.prefill or 0.0) for reply in self.replies if reply.first is not None]
        if not firsts:
            return [Phase("queue", start, max(reply.ended for reply in self.replies))]
        first = min(first for first, _ in firsts)
        placed = min(max(start, min(first - seconds for first, seconds in firsts)), first)
        last = max(reply.last for reply in self.replies if reply.first is not None)
        return [Phase("queue", start, placed), Phase("prefill", placed, first), Phase("decode", first, last)]

    def attributes(self) -> dict[str, Value]:
        """The `gen_ai.*` attributes."""
        found: dict[str, Value] = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": clean(self.model or self.served),
        }
        if self.samples > 1:
            found["gen_ai.request.choice.count"] = self.samples
        found |= self._sampling
        if self.streamed:
            found["gen_ai.request.stream"] = True
        if self.id:
            found["gen_ai.response.id"] = self.id
        ended = [reply for reply in self.replies if reply.last_chunk is not None]
        if ended:
            found["gen_ai.response.model"] = self.served
            found |= self._usage(ended)
        firsts = [reply.first for reply in ended if reply.first is not None]
        if firsts and self.streamed:
            found["gen_ai.response.time_to_first_chunk"] = min(firsts) - self.began
        return found

    def _usage(self, ended: list[ReplyTrace]) -> dict[str, Value]:
        """Tokens, a prompt's once however many replies it has, and how replies ended."""
        chunks = {reply: reply.last_chunk for reply in ended if reply.last_chunk is not None}
        prompts = {reply.prompt: chunk for reply, chunk in chunks.items()}.values()
        found: dict[str, Value] = {
            "gen_ai.usage.input_tokens": sum(chunk.prompt_tokens for chunk in prompts),
            "gen_ai.usage.cache_read.input_tokens": sum(chunk.cached_tokens for chunk in prompts),
            "gen_ai.usage.output_tokens": sum(chunk.completion_tokens for chunk in chunks.values()),
        }
        if finishes := [chunk.finish for chunk in chunks.values() if chunk.finish is not None]:
            found["gen_ai.response.finish_reasons"] = list(finishes)
        return found


TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)  # of the request at hand, if it is traced


def clean(text: str) -> str:
    """`text`, which may be a client's, as an attribute takes it: short, and of whole characters."""
    return text[:LONGEST].encode(errors="replace").decode()


def traces_url(endpoint: str) -> str:
    """Where spans are sent to: `endpoint` is the base of a collector's URL, or that with the path of its traces.

    Raises ConfigError for what is no URL."""
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigError(
            f"--otlp-endpoint is {endpoint!r}; give the URL of a collector that takes OTLP over HTTP, as "
            "http://localhost:4318"
        )
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith(TRACES_PATH) else path + TRACES_PATH).geturl()
