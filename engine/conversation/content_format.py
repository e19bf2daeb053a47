"""Whether a chat template goes through the parts of a message's content, as its source says it.

Templates of models that see are given a content as OpenAI has it, a list of parts, and loop over them; others write a
content as the text that it is. No name and no declaration tells which: this looks for a loop, or a filter that goes
through a list, over something that is the content of something in `messages`. Names that a template gives to either
are followed, through `set`, `for` and the parameters of its macros; their scopes are not told apart. Pure logic.
"""

from jinja2 import nodes

GOING_THROUGH = frozenset({"map", "select", "reject", "selectattr", "rejectattr", "groupby"})  # filters of lists


def goes_through_parts(tree: nodes.Template) -> bool:
    """Whether the template that `tree` is of goes through the content of a message part by part."""
    names = _Names(tree)
    lists = [loop.iter for loop in tree.find_all(nodes.For)]
    lists += [one.node for one in tree.find_all(nodes.Filter) if one.name in GOING_THROUGH and one.node is not None]
    return any(names.is_content(one) for one in lists)


class _Names:
    """The names that a template has for lists of messages, for messages and for contents."""

    def __init__(self, tree: nodes.Template) -> None:
        self._lists, self._messages, self._contents = {"messages"}, set[str](), set[str]()
        bound = list(_bindings(tree))
        loops = [
            (loop.target.name, loop.iter) for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name)
        ]
        known = 0
        while known != (known := self._count()):  # until nothing more follows
            for name, value in loops:
                if self._is_list(value):
                    self._messages.add(name)
            for name, value in bound:
                for kind, names in (
                    (self._is_list, self._lists),
                    (self._is_message, self._messages),
                    (self.is_content, self._contents),
                ):
                    if kind(value):
                        names.add(name)

    def _count(self) -> int:
        return len(self._lists) + len(self._messages) + len(self._contents)

    def _is_list(self, value: nodes.Node) -> bool:
        value = _bare(value)
        return isinstance(value, nodes.Name) and value.name in self._lists

    def _is_message(self, value: nodes.Node) -> bool:
        if isinstance(value, nodes.Getitem) and not isinstance(value.arg, nodes.Slice):
            return self._is_list(value.node)
        value = _bare(value)
        return isinstance(value, nodes.Name) and value.name in self._messages

    def is_content(self, value: nodes.Node) -> bool:
        """Whether `value` is the content of a message, or a part of it."""
        value = _bare(value)
        match value:
            case nodes.Name():
                return value.name in self._contents
            case nodes.Getattr():
                return value.attr == "content" and self._is_message(value.node)
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return self._is_message(value.node)
        return False


def _bindings(tree: nodes.Template) -> list[tuple[str, nodes.Node]]:
    """What `set` and calls of macros give to names."""
    bound: list[tuple[str, nodes.Node]] = [
        (one.target.name, one.node) for one in tree.find_all(nodes.Assign) if isinstance(one.target, nodes.Name)
    ]
    macros = {macro.name: [argument.name for argument in macro.args] for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            bound += zip(macros[call.node.name], call.args, strict=False)
            bound += [(keyword.key, keyword.value) for keyword in call.kwargs]
    return bound


def _bare(value: nodes.Node) -> nodes.Node:
    """`value` without filters and slices, which leave it the same kind of thing."""
    while isinstance(value, nodes.Filter) or (isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice)):
        if value.node is None:  # of a filter block
            break
        value = value.node
    return value
