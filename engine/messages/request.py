"""A request on its way in: as its client says it, and as the scheduler and the device take it."""

from typing import Any

from engine.conversation.parts import Image, Video
from engine.conversation.parts import Message as ChatMessage
from engine.messages.assets import Need
from engine.messages.base import Message
from engine.messages.cache import Blocks
from engine.messages.media import Prepared
from engine.messages.sessions import ProgramUse, SessionUse
from engine.params.grammar import Grammar
from engine.params.sampling import Sampling, SamplingParams


class Generate(Message, frozen=True):
    """http → tokenizer: one request; exactly one of `text`, `ids` (int32) and `messages` is set.

    Where `sampling.max_tokens` is None, `default_max_tokens` bounds the reply if there is that much room; where that is
    None too, the model's own default does. Requests
    share cached prefixes with those of the same `cache_salt` alone. With `echo` the reply's text begins with the
    prompt. It is a call of `program`, if that is not empty.
    """

    rid: str
    sampling: SamplingParams
    text: str | None = None
    ids: bytes | None = None
    messages: list[ChatMessage] | None = None
    priority: int = 0
    default_max_tokens: int | None = None
    # How the chat template writes `messages`: see Text.render_chat.
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] | None = None
    cache_salt: str = ""
    echo: bool = False
    chat_template: str | None = None  # in the place of the model's own
    tools: list[dict[str, Any]] | None = None  # that the chat template describes, as OpenAI writes them
    opening: str = ""  # of the reply, put behind the prompt of `messages` and not part of the reply's text
    show_marks: bool = False  # leave those special tokens in the text that the parsers look for
    special: bool | None = None  # add the tokenizer's special tokens to the prompt; None: to `text`, not to `messages`
    last: int | None = None  # keep only so many tokens of the prompt, its last; -1: as many as there is room for
    tell_prompt: bool = False  # the ids of the prompt's tokens
    # Log-probabilities of the prompt are those of the tokens after this position, told as if the prompt began there.
    # What comes before may be cached. A negative one counts from the end, and no medium comes after it.
    scored_after: int = 0
    session: SessionUse | None = None
    program: ProgramUse | None = None
    shown: tuple[Image | Video, ...] = ()  # what `text` or `ids` have places for, in order, until it is `media`
    media: tuple[Prepared, ...] = ()  # that the prompt has places for, in order

    @property
    def grammar(self) -> Grammar | None:
        """What the reply must be."""
        return self.sampling.grammar


class Embed(Message, frozen=True):
    """http → tokenizer: make a vector of one prompt; exactly one of `text` and `ids` (int32) is set. `first` keeps only
    so many tokens of it, its first; -1: as many as the model takes."""

    rid: str
    text: str | None = None
    ids: bytes | None = None
    priority: int = 0
    first: int | None = None


class Open(Message, frozen=True):
    """tokenizer → detokenizer: tokens of `rid` will come; turn them into text until one of `stop` or `stop_regex`.

    Neither is looked for in the first `min_tokens` tokens. `echo` goes before the reply's text. `prompt` (int32) is
    there where the prompt's log-probabilities are asked for: its tokens from the position `scored_after` on.
    `prompt_only` says that no token of the reply is asked for. The next three fields are those of SamplingParams, and
    `show_marks` is Generate's. `prompt_ids` (int32) are there where the prompt's ids are asked for. `shown` are
    how many of the prompt's tokens stand for images, and how many for video.
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
    shown: tuple[int, int] = (0, 0)


class Admit(Message, frozen=True):
    """tokenizer → scheduler: a checked request. `ids` is int32; `max_new` 0 asks for a vector in place of tokens. It
    runs once all its `needs` are met.

    The prompt's log-probabilities, where asked for, are those of the tokens after the position `scored_after`.

    `keys` (int32, one an id) is what prefixes are shared by, where that is not the ids themselves (cache/keys.py).
    `positions` (int32 [3, ids]) are where rotary embedding places the ids, where that is not their index.
    `blocks` are what a router knows the prompt by, where routers are told of the cache.
    `names` are those of its pages (cache/names.py), where the scheduler has named them before it knew the request.

    Calls of one `program` are admitted together, and what they have computed is kept for it."""

    rid: str
    ids: bytes
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new: int
    priority: int = 0
    cache_salt: str = ""
    needs: tuple[Need, ...] = ()
    keys: bytes = b""
    scored_after: int = 0
    blocks: Blocks | None = None
    session: SessionUse | None = None
    program: ProgramUse | None = None
    positions: bytes = b""
    names: tuple[bytes, ...] = ()


class Abort(Message, frozen=True):
    """http → tokenizer → scheduler: end `rid` now, freeing its pages; unknown ids are ignored."""

    rid: str


class EndPrograms(Message, frozen=True):
    """http → scheduler: no more calls of these programs will come; unknown ones, and those of others, are ignored."""

    owner: bytes
    cache_salt: str
    programs: tuple[str, ...]


class StopHit(Message, frozen=True):
    """detokenizer → scheduler: a stop string ended `rid` after `keep` tokens; nobody waits for more."""

    rid: str
    keep: int


Job = Generate | Embed
