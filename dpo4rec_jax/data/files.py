"""The files of a data set, lying in a directory, in a zip, or alone; plain or gz."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from dpo4rec_jax.config import InputError

# Where the files at data.path may lie: in it, or one folder down, as archives unpack.
DEPTH = 2

# Deflate shrinks logs and metadata by 3 to 30 times, but a bomb of zeros by 1,000.
MOST_RATIO, LEAST_BOUND_BYTES = 200, 64 * 2**20
BLOCK_BYTES = 2**20


class Files:
    """Names and contents below one path; an error in reading names the file.

    `names` are relative, with forward slashes, sorted. `read` and `open` unpack `.gz`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.names = sorted(self._list())
        if not self.names:
            raise InputError(f"{self.path}: no files in it; check data.path")

    def named(self, *endings: str) -> list[str]:
        """Files whose name ends so, `.gz` or not."""
        return [name for name in self.names if name.removesuffix(".gz").endswith(endings)]

    def first(self, *endings: str) -> str | None:
        return next(iter(self.named(*endings)), None)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return str(self.path if self.path.is_file() and not self._zipped() else self.path / name)

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    @contextmanager
    def open(self, name: str) -> Iterator[io.BufferedIOBase]:
        """A readable binary stream. What goes wrong while it is read raises InputError."""
        where = self.where(name)
        try:
            with self._opened(name) as (raw, size):
                yield bounded(raw, size, where, gz=name.endswith(".gz"))
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            raise InputError(f"{where}: truncated or damaged: {error}; get it again") from None
        except OSError as error:
            raise InputError(f"{where}: cannot be read: {error.strerror or error}") from None

    def _zipped(self) -> bool:
        return self.path.suffix == ".zip"

    def _list(self) -> list[str]:
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file or directory; check data.path")
        if self.path.is_dir():
            found = [path for depth in range(DEPTH) for path in self.path.glob("*/" * depth + "*")]
            return [path.relative_to(self.path).as_posix() for path in found if path.is_file()]
        if not self._zipped():
            return [self.path.name]
        try:
            with zipfile.ZipFile(self.path) as archive:
                return [checked_name(self.path, info.filename) for info in files_in(archive)]
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{self.path}: not a readable zip: {error}; get it again") from None

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Any, int]]:
        """The file as it lies there, and the bytes that it takes up."""
        if self._zipped():
            with zipfile.ZipFile(self.path) as archive, archive.open(name) as file:
                yield file, archive.getinfo(name).compress_size
        else:
            path = self.path / name if self.path.is_dir() else self.path
            with path.open("rb") as file:
                yield file, path.stat().st_size


def bounded(raw: Any, size: int, where: str, *, gz: bool) -> io.BufferedReader:
    """The contents of a binary file of `size` packed bytes, which may be packed once more as gz.

    Reading raises InputError where they are so much larger than the file as no data is, before
    they fill the memory.
    """
    most = max(LEAST_BOUND_BYTES, MOST_RATIO * size)
    contents = _Bounded(gzip.GzipFile(fileobj=raw) if gz else raw, most, where)
    return io.BufferedReader(contents, BLOCK_BYTES)


class _Bounded(io.RawIOBase):
    def __init__(self, file: Any, most: int, where: str):
        self._file, self._left, self._most, self._where = file, most, most, where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise InputError(
                f"{self._where}: unpacks to more than {self._most / 2**20:,.0f} MiB, over "
                f"{MOST_RATIO} times its size, as no data does; if it is meant so, give it unpacked"
            )
        return count


def files_in(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [info for info in archive.infolist() if not info.is_dir()]


def checked_name(archive: Path, name: str) -> str:
    """Raises InputError for a member that would be unpacked outside its archive's directory."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise InputError(f"{archive}: unsafe member name {name!r}; it points outside the archive")
    return name
