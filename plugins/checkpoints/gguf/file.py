"""A GGUF file, opened: its metadata as Python values and where each tensor's bytes lie.

The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
`gguf.GGUFReader` reads the same, but makes an array object of each token string, 100,000 of them: 1.6 s
where this takes 0.1 s. What quantized bytes mean is left to the gguf package.
"""

import math
import mmap
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape
from msgspec import Struct
from numpy.typing import NDArray

from engine.plugin import ConfigError, Terms

# the scalar types by their number in the file, as struct and numpy both write them
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4  # of a tensor, in GGML

Place = tuple[tuple[int, ...], GGMLQuantizationType, int]  # shape, type and offset of a tensor


class GGUFTensor(Struct, frozen=True):
    """A tensor's place: `shape` outermost first, `bytes` uint8 of shape [..., bytes of a row]."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    bytes: NDArray[np.uint8]


class GGUFFile:
    """`fields` maps metadata keys to values, `tensors` names to places, both in the file's order.

    Raises ConfigError when the file is missing, not a GGUF file, of another version, damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}; --model takes the path of a .gguf file")
        self.path = path
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise ConfigError(f"{path} is no GGUF file: it begins with {magic!r}, not b'GGUF'; download it again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 4
        try:
            version = self._scalar("<I")
            if version not in (2, 3):
                raise ConfigError(f"{path} is GGUF version {version:#x}; little-endian versions 2 and 3 can be read")
            tensors, fields = self._scalar("<Q"), self._scalar("<Q")
            self.fields = self._once((self._string(), self._value(self._scalar("<I"))) for _ in range(fields))
            places = self._once(self._place() for _ in range(tensors))
            self.tensors = self._views(places)
        except (struct.error, ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise ConfigError(f"{path} is damaged near byte {self._position} ({error}); download it again") from error

    def _once(self, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """A dictionary of `pairs`. Raises ValueError for a name that comes twice."""
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name} comes twice")
            found[name] = value
        return found

    def _scalar(self, format: str) -> Any:
        (value,) = struct.unpack_from(format, self._map, self._position)
        self._position += struct.calcsize(format)
        return value

    def _string(self) -> str:
        start = self._position + 8
        self._position = start + self._scalar("<Q")
        return self._map[start : self._position].decode()

    def _strings(self, count: int) -> list[str]:
        """Reads many strings in a third of the time that `_string` would take for them: a vocabulary has 100,000 and
        more."""
        found, size_at, data, position = [], struct.Struct("<Q").unpack_from, self._map, self._position
        for _ in range(count):
            begin = position + 8
            position = begin + size_at(data, position)[0]
            found.append(str(data[begin:position], "utf-8"))
            self._position = position  # where it is damaged, if it is
        return found

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, count = self._scalar("<I"), self._scalar("<Q")
            if item == STRING:
                return self._strings(count)
            values = np.frombuffer(self._map, SCALARS[item], count, self._position)
            self._position += values.nbytes
            return values.tolist()
        return self._scalar(SCALARS[kind])

    def _place(self) -> tuple[str, Place]:
        name = self._string()
        if (dimensions := self._scalar("<I")) > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]  # the file has the innermost first
        return name, (shape, GGMLQuantizationType(self._scalar("<I")), self._scalar("<Q"))

    def _views(self, places: dict[str, Place]) -> dict[str, GGUFTensor]:
        alignment = Terms(self.fields, str(self.path)).integer("general.alignment", 32, high=1 << 20)
        base = -(-self._position // alignment) * alignment
        views, spans = {}, []
        for name, (shape, kind, offset) in places.items():
            stored = quant_shape_to_byte_shape(shape, kind)
            begin, size = base + offset, math.prod(stored)
            if begin + size > len(self._map):
                raise ConfigError(
                    f"{self.path} is cut short: {name} ends at byte {begin + size}, "
                    f"the file at {len(self._map)}; download it again"
                )
            raw = np.frombuffer(self._map, np.uint8, size, begin) if size else np.empty(0, np.uint8)
            views[name] = GGUFTensor(shape, kind, raw.reshape(stored))
            spans.append((begin, begin + size, name))
        spans.sort()
        for (_, end, first), (begin, _, second) in pairwise(spans):
            if begin < end:
                raise ValueError(f"{first} and {second} share bytes")
        return views
