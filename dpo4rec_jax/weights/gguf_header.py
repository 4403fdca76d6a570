"""Whether the counts and lengths in a GGUF header can be true, before anything believes them.

The gguf package takes them as they stand: one flipped bit in a length, and it counts to 2^60.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

# Bytes of a value by its type; strings (8) and arrays (9) say their own length.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAGIC, VERSIONS = 0x46554747, (2, 3)
MOST_DIMENSIONS, DEEPEST_ARRAY = 8, 4


def check(path: Path) -> None:
    """Walks the header. Raises ValueError where it leads out of the file or makes no sense."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap):
        self._data, self._size, self._at = data, len(data), 0

    def header(self) -> None:
        magic, version = self._take("<II")
        if magic != MAGIC or version not in VERSIONS:
            raise ValueError(f"expected GGUF version 2 or 3, got {magic:#x} version {version}")
        num_tensors, num_values = self._take("<QQ")
        for _ in range(num_values):
            self._string()
            (kind,) = self._take("<I")
            self._value(kind)
        for _ in range(num_tensors):
            self._string()
            (dimensions,) = self._take("<I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions at byte {self._at}")
            self._skip(8 * dimensions + 4 + 8)  # sizes, type, offset

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self._string()
        elif kind == ARRAY and depth < DEEPEST_ARRAY:
            inner, count = self._take("<IQ")
            if inner in VALUE_BYTES:
                self._skip(VALUE_BYTES[inner] * count)
            else:
                for _ in range(count):
                    self._value(inner, depth + 1)
        elif kind in VALUE_BYTES:
            self._skip(VALUE_BYTES[kind])
        else:
            raise ValueError(f"a value of type {kind} at byte {self._at}")

    def _string(self) -> None:
        (length,) = self._take("<Q")
        self._skip(length)

    def _take(self, layout: str) -> tuple[int, ...]:
        start = self._at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            raise ValueError(f"its header leads to byte {self._at}, it ends at {self._size}")
