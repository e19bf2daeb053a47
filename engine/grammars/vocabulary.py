"""What grammar engines need to know of a model's tokenizer."""

from engine.config import Config
from engine.plugin.specs import Checkpoint, Vocabulary
from engine.text.fallback import read_text
from engine.text.tokenizer import Text


def read_vocabulary(checkpoint: Checkpoint, config: Config, size: int) -> Vocabulary:
    """All tokens of `checkpoint`, for a model of `size` of them, which may be more than the tokenizer has."""
    text = Text(read_text(checkpoint, config))
    spelled = [text.spelling[id] for id in range(size)]
    added = text.spec.tokenizer.get_added_tokens_decoder()
    special = frozenset(id for id, token in added.items() if token.special and id < size)
    eos_ids = tuple(id for id in text.spec.eos_ids if id < size)
    return Vocabulary(spelled, special.union(eos_ids), eos_ids)
