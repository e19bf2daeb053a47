"""The text of a checkpoint, in every process that needs it; and what stands in for it where dummy weights have none."""

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.config import Config
from engine.conversation.parsers import choose_parsers
from engine.errors import ConfigError
from engine.params.defaults import model_defaults
from engine.params.sampling import SamplingDefaults
from engine.plugin.registry import Plugins
from engine.plugin.specs import Checkpoint, TextSpec
from engine.plugin.terms import Terms
from engine.text.tokenizer import TOOL_USE, Text


def text_of(plugins: Plugins, checkpoint: Checkpoint, config: Config, template: str | None) -> Text:
    """The model's text, with the parsers that go with it; `template` takes the place of its own."""
    spec = read_text(checkpoint, config)
    architectures = checkpoint.config().get("architectures") or ()
    own = [source for source in (spec.chat_template, spec.named_templates.get(TOOL_USE)) if source is not None]
    parsers = choose_parsers(plugins, config.server, architectures, template or "\n".join(own) or None)
    return Text(spec, template, parsers, sampling_defaults(spec, config)[0])


def sampling_defaults(spec: TextSpec, config: Config) -> tuple[SamplingDefaults, list[str]]:
    """The values of sampling fields that requests leave out, and a sentence for each that the model states wrongly."""
    if config.model.sampling_defaults == "openai":
        return SamplingDefaults(), []
    return model_defaults(spec.generation)


def read_text(checkpoint: Checkpoint, config: Config) -> TextSpec:
    """The checkpoint's text; with dummy weights and no tokenizer, one token a byte, for what has 256 tokens or more.

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
