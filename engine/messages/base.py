"""The two bases of what crosses a channel."""

from msgspec import Struct


class Message(Struct, frozen=True, array_like=True, tag=True):
    """Base of what is sent on its own; the class name is the tag."""


class Part(Struct, frozen=True, array_like=True):
    """Base of what travels inside a message."""
