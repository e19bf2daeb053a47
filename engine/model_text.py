"""The text of a checkpoint, in every process that needs it; and what stands in for it where dummy weights have none."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.config import Config
from engine.errors import ConfigError
from engine.parsers import choose_parsers
from engine.plugin.manager import Plugins
from engine.plugin.specs import Checkpoint, TextSpec
from engine.text import Text


def text_of(plugins: Plugins, checkpoint: Checkpoint, config: Config, template: str | None) -> Text:
    """The model's text, with the parsers that go with it; `template` takes the place of its own."""
    spec = read_text(checkpoint, config)
    architectures = checkpoint.config().get("architectures") or ()
    parsers = choose_parsers(plugins, config.server, architectures, template or spec.chat_template)
    return Text(spec, template, parsers)


def read_text(checkpoint: Checkpoint, config: Config) -> TextSpec:
    """The checkpoint's text; with dummy weights and no tokenizer, one token a byte, for what has 256 tokens or more."""
    try:
        return checkpoint.text()
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
