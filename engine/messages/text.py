"""Work for a text process, which renders and tokenizes long prompts beside the event loop."""

from typing import Any

from engine.config import Config
from engine.conversation.parts import Message as ChatMessage
from engine.messages.base import Message
from engine.messages.media import Prepared as Medium
from engine.messages.request import Admit, Embed, Generate, Open


class Prepare(Message, frozen=True):
    """anyone → text process: render and tokenize this request for a model of that length and vocabulary."""

    job: "Generate | Embed"
    max_model_len: int
    vocab_size: int


class Tokenize(Message, frozen=True):
    """anyone → text process: the token ids of `text`, or of `messages` as the chat template writes them with `options`
    (those of Text.render_chat) and with their `media`. More than `most` tokens are refused; with `names` each token's
    text is told as well. The ids are also told with each of `endings` behind the text, or behind the beginning of the
    assistant's message."""

    text: str | None = None
    messages: list[ChatMessage] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
    special: bool = False
    names: bool = False
    most: int = 1 << 20
    endings: tuple[str, ...] = ()
    media: tuple[Medium, ...] = ()


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
    """text process → whoever asked: the answer to a Tokenize; `ids`, and those of each ending, are int32."""

    ids: bytes
    names: list[str] | None = None
    ended: tuple[bytes, ...] = ()


class Detokenized(Message, frozen=True):
    """text process → whoever asked: the answer to a Detokenize."""

    text: str


class TextBoot(Message, frozen=True):
    """text pool → text process: the first frame; `template` takes the place of the model's own chat template."""

    config: Config
    template: str | None = None


TextJob = Prepare | Tokenize | Detokenize


TextAnswer = Prepared | Tokenized | Detokenized
