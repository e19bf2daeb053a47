"""How much a model is to think, as far as its chat template has a switch for that.

A template that reads `reasoning_effort` is told it. One with an on-off switch (`enable_thinking`, `thinking`) is told
off at none and minimal, on at the others, whose degree is a hint. Where there is neither, all of it is one.
"""

from typing import Any

from engine.text.tokenizer import Text

SWITCHES = ("enable_thinking", "thinking")
OFF = ("none", "minimal")
DEGREE = "reasoning_effort"


def with_effort(
    text: Text | None, options: dict[str, Any], effort: str, *, tools: bool, switch: bool = True
) -> tuple[dict[str, Any], bool]:
    """`options` of a template with the variables that say `effort`, and whether they say all of it.

    What the request itself sets in them wins. Without `switch`, thinking is turned neither on nor off."""
    if text is None:  # it is still being read: the request will be refused
        return options, True
    read = text.template_variables(options.get("chat_template"), tools=tools)
    given = options.get("template_kwargs") or {}
    if DEGREE in read:
        said: dict[str, Any] = {DEGREE: effort}
    else:
        said = {name: effort not in OFF for name in SWITCHES if switch and name in read}
    whole = DEGREE in read or (effort in OFF and (bool(said) or text.parsers.reasoning is None))
    return {**options, "template_kwargs": {**said, **given} or None}, whole
