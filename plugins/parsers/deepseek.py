"""Calls as DeepSeek's models write them: a section of calls, each with its arguments between marks.

    V3, R1  <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a line with ```json, the arguments, ```<｜tool▁call▁end｜>
    V3.1    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>, the arguments, <｜tool▁call▁end｜>

All read both. They differ in how they write, and in the texts that R1 and its distilled models use as the first mark.
"""

from typing import ClassVar

from engine.plugin.parsing import CallSyntax, Steps, ToolParser

SECTION = "<｜tool▁calls▁begin｜>"
SECTION_END = "<｜tool▁calls▁end｜>"
CALL = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"


class Deepseek(ToolParser):
    """What all of them share."""

    sections: ClassVar[tuple[str, ...]] = (SECTION,)
    special = (SECTION, SECTION_END, CALL, CALL_END, SEPARATOR)

    def read(self) -> Steps[None]:
        """Sections, or calls outside of one, with text before, between and behind them."""
        mark = yield from self.until(*self.sections, CALL)
        while mark:
            yield from self.space()
            if (mark == CALL or (yield from self.literal(CALL))) and (yield from self.tried(self._call())):
                yield from self.space()
                if (yield from self.mark(SECTION_END)):
                    self.drop()
                else:
                    self.back()
            mark = yield from self.until(*self.sections, CALL)

    def _call(self) -> Steps[bool]:
        name = yield from self.before(SEPARATOR)
        if name is None:
            return False
        yield from self.space()
        if (yield from self.peek()) != "{":  # what it read is the kind of tool: function
            name = yield from self.before("\n")
            yield from self.literal(FENCE + "json")
            yield from self.space()
        if not name or not name.strip() or (yield from self.peek()) != "{":
            return False
        self.begin(name.strip())
        yield from self.arguments()
        yield from self.space()
        yield from self.mark(FENCE)
        yield from self.space()
        if (yield from self.mark(CALL_END)):
            self.drop()
        else:
            yield from self.back_unless_cut()
        self.close()
        return True


class DeepseekV3(Deepseek):
    syntax = CallSyntax(
        opening=SECTION,
        begin=f"{CALL}function{SEPARATOR}NAME\n{FENCE}json\n",
        end=f"\n{FENCE}{CALL_END}",
        closing=SECTION_END,
        trigger=CALL,
    )


class DeepseekR1(DeepseekV3):
    sections = (
        SECTION,
        "<｜tool_calls_begin｜>",
        "<｜tool calls begin｜>",
        "<｜tool\\_calls\\_begin｜>",
        "<｜tool▁calls｜>",
    )  # as such models are known to write it


class DeepseekV31(Deepseek):
    syntax = CallSyntax(
        opening=SECTION,
        begin=f"{CALL}NAME{SEPARATOR}",
        end=CALL_END,
        separator="",
        closing=SECTION_END,
        trigger=CALL,
    )
