"""Calls as Mistral's models write them behind [TOOL_CALLS]: a JSON list, or in newer ones name[ARGS]{...}."""

import re
from secrets import choice
from string import ascii_letters, digits

from engine.plugin.parsing import CallSyntax, Steps, ToolParser

MARK = "[TOOL_CALLS]"
CALL_ID = "[CALL_ID]"
ARGUMENTS = "[ARGS]"
NAME = re.compile(r"[\w.-]*")
ID_LENGTH = 9  # their templates refuse ids of another length


class Mistral(ToolParser):
    syntax = CallSyntax(
        opening=f"{MARK} [",
        begin='{"name": "NAME", "arguments": ',
        end="}",
        separator=", ",
        closing="]",
        trigger='{"name": "',
    )
    special = (MARK, CALL_ID, ARGUMENTS)

    def new_id(self) -> str:
        """Nine letters and digits."""
        return "".join(choice(ascii_letters + digits) for _ in range(ID_LENGTH))

    def read(self) -> Steps[None]:
        """Lists or single calls, each behind a mark of its own."""
        while (yield from self.until(MARK)):
            yield from self.space()
            if not (yield from self.call_list()):
                yield from self.tried(self._named_call())

    def _named_call(self) -> Steps[bool]:
        name = yield from self.word(NAME)
        if (yield from self.literal(CALL_ID)):
            yield from self.word(NAME)
        yield from self.literal(ARGUMENTS)
        yield from self.space()
        if not name or (yield from self.peek()) != "{":
            return False
        self.begin(name)
        yield from self.arguments()
        self.close()
        return True
