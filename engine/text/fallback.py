"""The text of a checkpoint, in every process that needs it: with templates, parsers, sampling defaults, and the
processor of media."""

from engine.config import Config
from engine.conversation.parsers import choose_parsers
from engine.conversation.processors import choose_processor
from engine.params.defaults import model_defaults
from engine.params.sampling import SamplingDefaults
from engine.plugin.registry import Plugins
from engine.plugin.specs import Checkpoint, TextSpec
from engine.text.checkpoint import read_text
from engine.text.tokenizer import TOOL_USE, Text


def text_of(plugins: Plugins, checkpoint: Checkpoint, config: Config, template: str | None) -> Text:
    """The model's text, with the parsers that go with it; `template` takes the place of its own."""
    spec = read_text(checkpoint, config)
    architectures = checkpoint.config().get("architectures") or ()
    own = [source for source in (spec.chat_template, spec.named_templates.get(TOOL_USE)) if source is not None]
    parsers = choose_parsers(plugins, config.server, architectures, template or "\n".join(own) or None)
    media = choose_processor(
        plugins, checkpoint, lambda text: spec.tokenizer.encode(text, add_special_tokens=False).ids
    )
    return Text(spec, template, parsers, sampling_defaults(spec, config)[0], media)


def sampling_defaults(spec: TextSpec, config: Config) -> tuple[SamplingDefaults, list[str]]:
    """The values of sampling fields that requests leave out, and a sentence for each that the model states wrongly."""
    if config.model.sampling_defaults == "openai":
        return SamplingDefaults(), []
    return model_defaults(spec.generation)
