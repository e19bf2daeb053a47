"""What requests need on the device before they may run: made once, loaded, and shared by its content.

A kind is a word ("grammar"). The scheduler reads neither content nor payload: maker and loader of a kind agree on them.
Numbers begin with 1, are not used again, and belong to one thing whatever its kind.
"""

from engine.messages.base import Message, Part


class Need(Part, frozen=True):
    """A thing that a request waits for. Needs of the same kind and `content` share one thing. `use` is this request's
    alone: how its row uses the thing. `payload` is what a maker would make, where the request brings it along."""

    kind: str
    content: bytes
    use: bytes = b""
    payload: bytes = b""


class Bound(Part, frozen=True):
    """A need that is met: the `number` of the thing on the device."""

    kind: str
    number: int
    use: bytes = b""


class Make(Message, frozen=True):
    """scheduler → maker of this kind: prepare what a request waits for."""

    kind: str
    number: int
    content: bytes


class Made(Message, frozen=True):
    """maker → scheduler: the answer to a Make after `seconds`: the payload that a device loads, or a refusal for all
    that wait.

    A `status` other than 0 refuses; `code`, `cause` and `param` are as in RequestError. `lasting` says that another
    attempt would be refused too."""

    kind: str
    number: int
    seconds: float
    payload: bytes = b""
    status: int = 0
    code: str = ""
    cause: str = ""
    lasting: bool = True
    param: str = ""


class Load(Message, frozen=True):
    """scheduler → worker: get this ready for rows that come with its number."""

    kind: str
    number: int
    payload: bytes


class Loaded(Message, frozen=True):
    """worker → scheduler: it is ready, or cannot be used for a reason."""

    kind: str
    number: int
    cause: str = ""


class Drop(Message, frozen=True):
    """scheduler → worker: no row will come with this number again."""

    kind: str
    number: int
