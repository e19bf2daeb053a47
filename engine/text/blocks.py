"""Which tokens of a prompt hold the blocks of its canonical text, so that a router may be told of them.

A block is of the text that routers know (conversation/canonical.py); the model reads what the chat template makes of
it. Both have the client's own texts as they are, so these are looked for in the prompt, from its end:

    canonical   ␞system␊Be short.␞user␊What is a radix tree?
                          └──┐                └──────────┐
    prompt      <|im_start|>system␊Be short.<|im_end|>␊ … What is a radix tree?

A block that ends in a text ends there in the prompt; one that ends between two texts, where the next one begins.

The answer is never too early: a text that is short, or not found in its place, is taken for what stands between, and
of several places the last one counts. Templates write tools before or behind the system's message, so with tools that
one stands between as well. Token ends come from the bytes that tokens spell; where these are more than those of the
prompt (a first token, a space in front), every end is late by as many, and where they are fewer, all tokens count.
Left out: prompts that differ for reasons of which their text says nothing (`is_plain`), and media.
"""

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from engine.conversation.canonical import BLOCK, chained, of_ids, space_of, written
from engine.conversation.parts import Message, Text
from engine.messages.cache import Blocks
from engine.messages.request import Generate

LEAST = 16  # characters of a text that is looked for: shorter ones stand in many places
TAIL = 64  # characters that are looked for; the rest is compared
BETWEEN = 1024  # characters that a template may write between two texts, beside what stands there already
LOOKED_AT = 8  # how often the length of the prompt all searches together may go over

Anchor = tuple[int, int, int]  # where a text begins in the canonical text, and in the prompt, and its length


class Widths(dict[int, int]):
    """How many bytes tokens spell, filled in as ids are seen."""

    def __init__(self, spelling: Mapping[int, bytes]) -> None:
        self._spelling = spelling

    def __missing__(self, id: int) -> int:
        width = self[id] = len(self._spelling[id])
        return width


def is_plain(request: Generate) -> bool:
    """Whether the text of `request`, its tools and its messages say how its prompt begins."""
    return request.special is None and request.chat_template is None and request.last is None


def blocks_of(request: Generate, prompt: str | None, ids: Sequence[int], widths: Widths) -> Blocks | None:
    """The blocks of a plain request, whose `prompt` (None where it has brought ids) is `ids`; None without any."""
    if request.ids is not None:
        text = of_ids(request.ids)
        ends = [-(-end // 4) for end in range(BLOCK, len(text) + 1, BLOCK)]
    elif request.messages is not None:
        assert prompt is not None, "a conversation is rendered"
        made = written(request.messages, request.tools or ())
        text = made.whole()
        texts = made.texts[_leading(request.messages) if request.tools else 0 :]
        ends = token_ends(prompt, ids, widths, places(len(text), anchors(texts, len(text), prompt), len(prompt)))
    else:
        assert prompt is not None and prompt == request.text, "a text is its own prompt"
        text = prompt
        ends = token_ends(prompt, ids, widths, list(range(BLOCK, len(text) + 1, BLOCK)))
    if not ends:
        return None
    space = space_of(request.cache_salt)
    return Blocks(space, chained(text, space).tobytes(), array("i", ends).tobytes())


def _leading(messages: Sequence[Message]) -> int:
    """How many texts the system's messages at the beginning have."""
    count = 0
    for message in messages:
        if message.role not in ("system", "developer"):
            break
        count += sum(isinstance(part, Text) for part in message.parts)
    return count


def anchors(texts: Sequence[tuple[int, str]], length: int, prompt: str) -> list[Anchor]:
    """Where `texts` of a canonical text of `length` characters stand in `prompt`, the last place of each."""
    found: list[Anchor] = []
    limit, left = len(prompt), LOOKED_AT * len(prompt)
    next_begin = length
    for begin, text in reversed(texts):
        said = text.strip()
        if len(said) < LEAST:
            continue
        begin += text.index(said[0])
        between = min(BETWEEN + 2 * max(0, next_begin - begin - len(said)), left)
        left -= between
        tail = said[-TAIL:]
        at = prompt.rfind(tail, max(0, limit - len(tail) - between), limit)
        start = at + len(tail) - len(said)
        if at < 0 or start < 0 or not prompt.startswith(said, start):
            continue
        found.append((begin, start, len(said)))
        limit, next_begin = start, begin
    found.reverse()
    return found


def places(length: int, found: Sequence[Anchor], end: int) -> list[int]:
    """Where the blocks of a canonical text of `length` characters end in a prompt of `end` characters."""
    ends: list[int] = []
    anchor = 0
    for at in range(BLOCK, length + 1, BLOCK):
        while anchor < len(found) and found[anchor][0] + found[anchor][2] < at:
            anchor += 1
        if anchor == len(found):
            ends.append(end)
        else:
            begin, start, _ = found[anchor]
            ends.append(start + max(0, at - begin))
    return ends


def token_ends(prompt: str, ids: Sequence[int], widths: Widths, ends: Sequence[int]) -> list[int]:
    """How many of `ids`, which `prompt` was encoded as, hold its first `ends[i]` characters; never too few."""
    if not ends:
        return []
    reached = list(accumulate(map(widths.__getitem__, ids)))
    if prompt.isascii():
        *in_bytes, size = *ends, len(prompt)
    else:
        pieces = pairwise((0, *ends, len(prompt)))
        *in_bytes, size = accumulate(len(prompt[begin:end].encode("utf-8", "surrogatepass")) for begin, end in pieces)
    late = reached[-1] - size
    if late < 0:
        return [len(ids)] * len(ends)
    return [min(bisect_left(reached, end + late) + 1, len(ids)) for end in in_bytes]
