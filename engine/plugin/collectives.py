"""What the ranks of a model do together, for layers of a plugin's own: `engine.parallel`, by the door for plugins.

Imports torch."""

from engine.parallel.collectives import Group, all_gather, all_reduce, broadcast, reduce_scatter

__all__ = ["Group", "all_gather", "all_reduce", "broadcast", "reduce_scatter"]
