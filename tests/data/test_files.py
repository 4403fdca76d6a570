from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.files import Files


def zipped(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_file_reads_the_same_wherever_it_lies(tmp_path: Path) -> None:
    content = b"1\t2\n" * 9
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "u.data").write_bytes(content)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(content))
    archive = zipped(
        tmp_path / "a.zip", **{"set/u.data": content, "set/u.gz": gzip.compress(content)}
    )
    for files, name in (
        (Files(tmp_path), "set/u.data"),
        (Files(tmp_path / "set"), "u.data"),
        (Files(tmp_path / "set" / "u.data"), "u.data"),
        (Files(tmp_path / "packed.csv.gz"), "packed.csv.gz"),
        (Files(archive), "set/u.data"),
        (Files(archive), "set/u.gz"),
    ):
        assert name in files.names
        assert files.read(name) == content


def test_truncated_and_damaged_contents_are_input_errors(tmp_path: Path) -> None:
    packed = gzip.compress(bytes(range(256)) * 99)
    (tmp_path / "cut.gz").write_bytes(packed[:-30])
    (tmp_path / "no.gz").write_bytes(b"plain text")
    wrong = bytearray(packed)
    wrong[len(wrong) // 2] ^= 0xFF
    (tmp_path / "wrong.gz").write_bytes(bytes(wrong))
    for name in ("cut.gz", "no.gz", "wrong.gz"):
        with pytest.raises(InputError, match=f"{name}: truncated or damaged"):
            Files(tmp_path).read(name)
    archive = zipped(tmp_path / "a.zip", member=b"x" * 100)
    archive.write_bytes(archive.read_bytes().replace(b"x" * 50, b"y" * 50))
    with pytest.raises(InputError, match="member: truncated or damaged"):
        Files(archive).read("member")
