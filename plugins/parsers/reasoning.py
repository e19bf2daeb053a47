"""Families that write their reasoning between <think> and </think> before they reply."""

from engine.plugin.parsing import ReasoningParser


class DeepseekR1(ReasoningParser):
    """Thinks always, unless the prompt says otherwise; the first mark may be missing."""

    start = "<think>"
    end = "</think>"
    assumed = True


class Qwen3(ReasoningParser):
    """Thinks if it writes the first mark, or the prompt does."""

    start = "<think>"
    end = "</think>"
