"""The fields that /v1/chat/completions and /v1/completions share.

Beyond OpenAI's own fields both take vLLM's (top_k, min_p, stop_regex, prompt_logprobs and so on), and the names and
defaults that clients of llama.cpp send. The sampling fields are in engine/params/sampling.py.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from engine.http.fields import LABEL, Rule, hint, unserved
from engine.http.grammars import GrammarBody
from engine.http.wire import Body, Priority
from engine.params.sampling import INT32_MAX


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    rules: ClassVar[Mapping[str, Rule]] = {"include_obfuscation": LABEL}  # no padding is added


class SamplingBody(GrammarBody, kw_only=True):
    """Fields that both kinds of completion share. Null is the same as absent."""

    model: str | None = None
    n: int | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    program: str | None = None
    priority: Priority | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    return_token_ids: bool | None = None
    user: Any = None
    request_id: Any = None
    spaces_between_special_tokens: Any = None
    # Of other servers, which some clients send at their defaults.
    cache_prompt: Any = None
    dry_multiplier: Any = None
    early_stopping: Any = None
    length_penalty: Any = None
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    use_beam_search: Any = None
    xtc_probability: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        **GrammarBody.rules,
        "user": LABEL,
        "request_id": hint(),  # X-Request-Id is the way
        "spaces_between_special_tokens": unserved(True),
        "cache_prompt": hint(True),
        "dry_multiplier": unserved(0),
        "early_stopping": unserved(False),
        "length_penalty": unserved(1),
        "mirostat": unserved(0),
        "mirostat_eta": hint(),  # of mirostat, which is refused
        "mirostat_tau": hint(),
        "tfs_z": unserved(1),
        "typical_p": unserved(1),
        "use_beam_search": unserved(False),
        "xtc_probability": unserved(0),
    }
