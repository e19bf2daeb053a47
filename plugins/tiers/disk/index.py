"""Which page lies where, in memory: what tables of segments say, less what turned out otherwise. Pure.

Left out: locks; its store has one around it.
"""

from collections.abc import Iterable
from typing import NamedTuple

from engine_plugins.tiers.disk.layout import Entry, Layout


class Segment:
    """A file of the folder as it was last read."""

    def __init__(self, name: str, layout: Layout) -> None:
        self.name = name
        self.id = bytes.fromhex(name.partition(".")[0])
        self.layout = layout
        self.seen = 0  # the file's time when its table was read
        self.touched = 0.0  # when the file's time was last set by us
        self.keys: dict[int, bytes] = {}  # by the number of the entry
        self.gone: dict[int, bytes] = {}  # entries whose pages are not to be had, although a table said so

    @property
    def full(self) -> bool:
        """Whether its last entry has been taken."""
        last = self.layout.pages - 1
        return last in self.keys or last in self.gone


class Place(NamedTuple):
    """Where a page lies, and its checksum."""

    segment: Segment
    number: int
    checksum: int


class Index:
    """The segments by name, and the places of pages by key."""

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}
        self._places: dict[bytes, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> Place | None:
        return self._places.get(key)

    def add(self, segment: Segment, entries: Iterable[Entry]) -> None:
        """Take in entries of a segment, known ones among them. Of two pages with one key either will do."""
        self.segments[segment.name] = segment
        for entry in entries:
            before = segment.keys.get(entry.number)
            if entry.key in (before, segment.gone.get(entry.number)):
                continue
            if before is not None:
                self._displace(before, segment)
            segment.keys[entry.number] = entry.key
            self._places[entry.key] = Place(segment, entry.number, entry.checksum)

    def written(self, segment: Segment, entry: Entry) -> None:
        """We have just written a page, maybe in the place of one that was gone."""
        if self.segments.get(segment.name) is segment:
            segment.gone.pop(entry.number, None)
            self.add(segment, [entry])

    def forget(self, key: bytes) -> Place | None:
        """The page of `key` is not to be had; where it was."""
        place = self._places.pop(key, None)
        if place is not None:
            place.segment.gone[place.number] = key
            place.segment.keys.pop(place.number, None)
        return place

    def forget_segment(self, name: str) -> None:
        """The file `name` is gone."""
        segment = self.segments.pop(name, None)
        if segment is not None:
            for key in segment.keys.values():
                self._displace(key, segment)

    def _displace(self, key: bytes, segment: Segment) -> None:
        """The page of `key` is not in `segment` any more; it may be in another."""
        if (place := self._places.get(key)) is not None and place.segment is segment:
            del self._places[key]
