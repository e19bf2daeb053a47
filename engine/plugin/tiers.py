"""What a tier of KV pages below the device's memory is written with, for plugins. Torch-free.

Two kinds of place hold pages that the device has no room for:

    pool     memory that a device copies to and from at once. The engine numbers its pages, and decides which holds what
    store    whatever keeps pages by their keys, and may lose them: a disk, another process, another host

A rank has one pool, and may have one store below it. Each lives in the rank's worker process. A page is all that this
rank keeps of some successive tokens, in all its layers, as bytes. Its key is 32 bytes. It follows from all tokens up
to the page's end, from the salt of their requests, and from the manifest, so equal keys mean equal pages.

The manifest says what the bytes of a page depend on: the model's weights and config.json, the types, the layout, the
page size, the parallel shape, and this rank's place in it. A store that outlives the process keeps pages of unlike
manifests apart.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

KEY_BYTES = 32

Manifest = Mapping[str, str | int | list[int]]


class Held(Struct, frozen=True):
    """What a store holds now: `pages` of so many `bytes` together, of which it holds at most `bound`.

    `counts` is what has happened so far, under names of its own, each of which only grows: /metrics tells them."""

    pages: int
    bytes: int
    bound: int
    counts: dict[str, int] = {}


class Store(Protocol):
    """Keeps pages by their keys. Every method blocks its caller, and is called from several threads at a time.

    None raises for what a disk or a network does: a page that cannot be kept or found is said to be so, and the engine
    computes it again."""

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview], /) -> list[bool]:
        """Keep these pages; False for one that is not kept. The caller changes no page before this returns."""
        ...

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview], /) -> list[bool]:
        """Write each page into its place; False for one that is not here, or is not what was put. What lies in its
        place then is undefined."""
        ...

    def has(self, keys: Sequence[bytes], /) -> list[bool]:
        """Which of the pages `get` would most likely give. Reads no page."""
        ...

    def drop(self, keys: Sequence[bytes], /) -> None:
        """Forget these pages; unknown ones are no error."""
        ...

    def held(self) -> Held:
        """What is held now."""
        ...

    def clear(self) -> str | None:
        """Forget all pages of this manifest, those of a life before this one among them. Where some might be given
        again, by this store or by one that is opened later, say why, for people: a user is told that the cache is not
        cleared. The engine then asks again later, and nothing else until that is done."""
        ...

    def close(self) -> None:
        """Called once, when the engine stops; the process may also end without it."""
        ...


class Pool(Protocol):
    """Memory of pages, one after the other. Who built it decides where it lies; the engine does the rest."""

    @property
    def memory(self) -> memoryview:
        """Writable bytes, as many as were asked for, at one address until the process ends."""
        ...


class BuildTier(Protocol):
    """The target of a tier's entry: makes the pool or the store of one rank.

    It has at most `capacity_bytes` for pages of `page_bytes` each: a pool for those of its rank, a store together with
    all others of the same `argument`, which is what the option says beside the size: a path, of a disk. Raises
    ConfigError for what the user must change. A store that finds its pages damaged starts all the same, without
    them."""

    def __call__(
        self, *, capacity_bytes: int, page_bytes: int, manifest: Manifest, argument: str
    ) -> "Store | Pool": ...


__all__ = ["KEY_BYTES", "BuildTier", "Held", "Manifest", "Pool", "Store"]
