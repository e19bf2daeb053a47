"""What a routing policy is written with, for plugins: the base class, what it is told and says, and an index of who
holds which prefix. Torch-free."""

from engine.conversation.canonical import BLOCK, chained
from engine.router.index import PrefixIndex
from engine.router.policy import INDEX_CHARS, Arrival, Choice, RoutingPolicy, View

__all__ = ["BLOCK", "INDEX_CHARS", "Arrival", "Choice", "PrefixIndex", "RoutingPolicy", "View", "chained"]
