"""Whether a chat template goes through the parts of a message's content, as its source says it.

Templates of models that see are given a content as OpenAI has it, a list of parts, and loop over them; others write a
content as the text that it is. No name and no declaration tells which: this looks for a loop, or a filter that goes
through a list, over something that is the content of something in `messages`. Names that a template gives to either
are followed, through `set`, `for` and the parameters of its macros; their scopes are not told apart. Pure logic.
"""

from collections.abc import Iterator

from jinja2 import nodes

ROUNDS = 8  # names of names of names: more than any template has
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
        for _ in range(ROUNDS):
            self._messages |= {name for name, value in loops if self._is_list(value)}
            self._lists |= {name for name, value in bound if self._is_list(value)}
            self._messages |= {name for name, value in bound if self._is_message(value)}
            self._contents |= {name for name, value in bound if self.is_content(value)}

    def _is_list(self, value: nodes.Node) -> bool:
        return any(isinstance(one, nodes.Name) and one.name in self._lists for one in _same(value))

    def _is_message(self, value: nodes.Node) -> bool:
        for one in _same(value):
            match one:
                case nodes.Name(name=name) if name in self._messages:
                    return True
                case nodes.Getitem(node=of) if self._is_list(of):
                    return True
        return False

    def is_content(self, value: nodes.Node) -> bool:
        """Whether `value` is the content of a message, or some of its parts."""
        for one in _same(value):
            match one:
                case nodes.Name(name=name) if name in self._contents:
                    return True
                case nodes.Getattr(attr="content", node=of) if self._is_message(of):
                    return True
                case nodes.Getitem(arg=nodes.Const(value="content"), node=of) if self._is_message(of):
                    return True
        return False


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """What `set` and calls of macros give to names."""
    for one in tree.find_all(nodes.Assign):
        if isinstance(one.target, nodes.Name):
            yield one.target.name, one.node
    macros = {macro.name: [argument.name for argument in macro.args] for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            yield from zip(macros[call.node.name], call.args, strict=False)
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _same(value: nodes.Node) -> Iterator[nodes.Node]:
    """What `value` may be, but for filters and slices, which leave it the same kind of thing."""
    match value:
        case nodes.Filter(node=nodes.Node() as of) | nodes.Getitem(node=of, arg=nodes.Slice()):
            yield from _same(of)
        case nodes.CondExpr(expr1=first, expr2=second) | nodes.Or(left=first, right=second):
            yield from _same(first)
            if second is not None:
                yield from _same(second)
        case _:
            yield value
