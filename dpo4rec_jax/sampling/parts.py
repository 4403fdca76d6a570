"""Part files: texts on disk as they are finished, so that a killed run asks only for the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.texts import Kind, TextRecord, read_records, record_line, write_records


class Parts:
    """The unfinished `{name}.jsonl` of a directory: one part file a process, lines appended.

    A group is the texts of one (kind, id), written together by one `append` (or, where texts come
    one by one, in several). What a kill cut off, at most the last line of a file, is dropped when
    process 0 opens the parts; the others must not write before.
    """

    def __init__(self, directory: Path, name: str, process: int = 0):
        self._directory, self._name = directory, name
        self._own = directory / f"{name}.part{process}.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._paths() if process == 0 else ():
            _drop_cut_line(path)

    def records(self) -> list[TextRecord]:
        """All texts so far, of every process."""
        return [record for path in self._paths() for record in read_records(path)]

    def append(self, records: Iterable[TextRecord]) -> None:
        """Adds texts in one write: after a kill they are all there, or the last ones are cut."""
        lines = [json.dumps(record_line(record), ensure_ascii=False) + "\n" for record in records]
        with self._own.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def assemble(self, wanted: Iterable[tuple[Kind, str, int]]) -> None:
        """Writes `{name}.jsonl` with the texts of (kind, id, sample) in that order and removes the
        parts. Raises InputError where one is missing."""
        held = {(record.kind, record.id, record.sample): record for record in self.records()}
        records = []
        for key in wanted:
            if key not in held:
                raise InputError(
                    f"{self._directory}: no text of {key[0]} {key[1]!r}, sample {key[2]}; were the "
                    "part files of every process there? run the stage again"
                )
            records.append(held[key])
        write_records(self._directory / f"{self._name}.jsonl", records)
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob(f"{self._name}.part*.jsonl"))


def _drop_cut_line(path: Path) -> None:
    """A line without its newline was being written when the run was killed."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
