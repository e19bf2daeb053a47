"""What grammar engines need to know of a model's tokenizer."""

from engine.config import Config
from engine.plugin.specs import Checkpoint, Vocabulary
from engine.text.checkpoint import read_text
from engine.text.decoding import Spelling


def read_vocabulary(checkpoint: Checkpoint, config: Config, size: int) -> Vocabulary:
    """All tokens of `checkpoint`, for a model of `size` tokens, which may be more than the tokenizer has."""
    text = read_text(checkpoint, config)
    spelling = Spelling(text.tokenizer)
    special = frozenset(id for id in spelling.special if id < size)
    eos_ids = tuple(id for id in text.eos_ids if id < size)
    return Vocabulary([spelling[id] for id in range(size)], special.union(eos_ids), eos_ids)
