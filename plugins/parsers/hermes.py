"""Calls as Hermes and Qwen write them: each a JSON object in <tool_call> and </tool_call>, anywhere in the reply."""

from engine.plugin.parsing import CallSyntax, Steps, ToolParser

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class Hermes(ToolParser):
    syntax = CallSyntax(begin=f'{OPEN}\n{{"name": "NAME", "arguments": ', end=f"}}\n{CLOSE}", trigger=OPEN)
    special = (OPEN, CLOSE)

    def read(self) -> Steps[None]:
        """Any number of calls, with text before, between and behind them."""
        while (yield from self.until(OPEN)):
            yield from self.space()
            if (yield from self.call_object()):
                yield from self.space()
                if (yield from self.mark(CLOSE)):
                    self.drop()
                else:
                    self.back()
