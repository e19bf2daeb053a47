"""Reads a checkpoint's text: its tokenizer and what goes with it, or a stand-in for dummy weights that have none.

Every process that knows tokens needs this, and most of them need no chat template, so it stands apart from fallback.py.
"""

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.config import Config
from engine.errors import ConfigError
from engine.plugin.specs import Checkpoint, TextSpec
from engine.plugin.terms import Terms


def read_text(checkpoint: Checkpoint, config: Config) -> TextSpec:
    """The checkpoint's text. With dummy weights and no tokenizer, one token a byte, if the model has 256 tokens or
    more.

    Ids that no token of the model has end no reply: they are left out of `eos_ids`."""
    try:
        spec = checkpoint.text()
        size = Terms(checkpoint.config()).integer("vocab_size", None)
        known = tuple(id for id in spec.eos_ids if id >= 0 and (size is None or id < size))
        return spec if known == spec.eos_ids else msgspec.structs.replace(spec, eos_ids=known)
    except ConfigError:
        if config.model.load == "auto":
            raise
    bytes_alone = models.BPE(
        vocab={symbol: id for id, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]
    )
    tokenizer = Tokenizer(bytes_alone)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextSpec(tokenizer=tokenizer, eos_ids=())
