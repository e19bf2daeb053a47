"""Calls as Llama 3.1 to 3.3 write them: a bare JSON object at the beginning of the reply, or behind <|python_tag|>.

JSON that names no tool of the request is content. Left out: the calls of built-in tools, which are Python.
"""

from engine.plugin.parsing import CallSyntax, Steps, ToolParser

TAG = "<|python_tag|>"


class Llama3Json(ToolParser):
    syntax = CallSyntax(begin='{"name": "NAME", "parameters": ', end="}", separator="; ", trigger='{"name": "')
    special = (TAG,)

    def read(self) -> Steps[None]:
        """Calls with semicolons between them, then text."""
        yield from self.space()
        yield from self.literal(TAG)
        while True:
            yield from self.space()
            called = yield from self.call_object(known=True)
            if called:
                yield from self.space()
                if (yield from self.literal(";")):
                    yield from self.space()
                    if (yield from self.peek()):
                        continue
                yield from self.back_unless_cut()
            if not (yield from self.until(TAG)):
                return
