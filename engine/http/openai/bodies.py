"""What /v1/chat/completions and /v1/completions are asked.

Beyond OpenAI's own fields they take vLLM's (top_k, min_p, stop_regex, prompt_logprobs and so on), and the names and
defaults that clients of llama.cpp send.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from engine.http.fields import LABEL, Rule, hint, label, unserved
from engine.http.openai.conversation import FEW_MESSAGES, FEW_TOOLS, ChatMessage, Effort, ToolBody, ToolChoice
from engine.http.openai.grammars import GrammarBody
from engine.http.wire import Body
from engine.params.sampling import INT32_MAX

TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Priority = Annotated[int, Meta(ge=-INT32_MAX, le=INT32_MAX)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    rules: ClassVar[Mapping[str, Rule]] = {"include_obfuscation": LABEL}  # no padding is added


class SamplingBody(GrammarBody, kw_only=True):
    """Fields that both kinds of completion share. Null is the same as absent; `repeat_penalty` is llama.cpp's name for
    `repetition_penalty`."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    stop_regex: str | list[str] | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    detokenize: bool | None = None
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


class ChatBody(SamplingBody, kw_only=True):
    messages: Annotated[list[ChatMessage], FEW_MESSAGES]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolBody], FEW_TOOLS] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Effort | None = None
    stream_reasoning: Any = None
    best_of: Any = None
    cache_control: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    service_tier: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        **SamplingBody.rules,
        "best_of": unserved(1, remedy="send n, and choose among the replies"),
        "cache_control": LABEL,
        "metadata": LABEL,
        "store": label(False),
        "safety_identifier": LABEL,
        "prompt_cache_key": LABEL,
        "prompt_cache_options": LABEL,
        "prompt_cache_retention": LABEL,
        "audio": unserved(),
        "functions": unserved([], remedy="send tools, which took its place"),
        "function_call": unserved("none", "auto", remedy="send tool_choice, which took its place"),
        "modalities": unserved(["text"]),
        "moderation": unserved(),
        "prediction": hint(),
        "service_tier": hint("auto", "default"),
        "stream_reasoning": unserved(True),
        "verbosity": hint("medium"),
        "web_search_options": unserved(),
    }


class CompletionBody(SamplingBody, kw_only=True):
    prompt: str | list[TokenId | str | list[TokenId]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {**SamplingBody.rules, "suffix": unserved("")}
