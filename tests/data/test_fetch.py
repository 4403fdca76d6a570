from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data import fetch as fetching
from dpo4rec_jax.data.fetch import fetch
from dpo4rec_jax.data.resources import RESOURCES, File, Package, Resource

CONTENT = b"1\t2\t3\n" * 100
SUM = hashlib.sha256(CONTENT).hexdigest()


class World:
    """Addresses and an index that answer as told, and count how often they are asked."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.directory, self.asked = directory, []
        self.online, self.carried, self.served = True, CONTENT, CONTENT
        monkeypatch.setattr(fetching.urllib.request, "urlopen", self.urlopen)
        monkeypatch.setattr(fetching.subprocess, "run", self.run)
        file = File("a.data", SUM, len(CONTENT))
        toy = Resource(
            "https://toy.example", (file,), Package("toy-data", "1.0", "toy/sub", (file,))
        )
        monkeypatch.setitem(RESOURCES, "toy", toy)

    def urlopen(self, address: str, timeout: float):
        self.asked.append(address)
        assert timeout <= 5
        if not self.online:
            raise OSError("no route")
        path = self.directory / "served"
        path.write_bytes(self.served)
        return fetching.urllib.request.OpenerDirector.open(self.opener(), path.as_uri())

    def opener(self):
        opener = fetching.urllib.request.OpenerDirector()
        opener.add_handler(fetching.urllib.request.FileHandler())
        return opener

    def run(self, command: list[str], **_):
        self.asked.append(command[-1])
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        if self.carried is None:
            return subprocess.CompletedProcess(
                command, 1, "", "ERROR: first\nERROR: no such version"
            )
        target = Path(command[command.index("-d") + 1]) / "toy_data-1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            wheel.writestr("toy/__init__.py", "raise SystemExit('imported')")
            wheel.writestr("toy/sub/a.data", self.carried)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_the_official_address_comes_first_and_the_cache_before_it(
    world: World, tmp_path: Path
) -> None:
    first = fetch("toy", tmp_path / "cache")
    assert (first / "a.data").read_bytes() == CONTENT
    assert fetch("toy", tmp_path / "cache") == first
    assert world.asked == ["https://toy.example/a.data"]


def test_the_package_stands_in_when_offline(world: World, tmp_path: Path) -> None:
    world.online = False
    path = fetch("toy", tmp_path / "cache")
    assert (path / "a.data").read_bytes() == CONTENT
    assert world.asked == ["https://toy.example/a.data", "toy-data==1.0"]
    assert [inner.name for inner in path.parent.iterdir()] == ["toy"]


def test_other_bytes_than_expected_are_not_taken(world: World, tmp_path: Path) -> None:
    world.served = CONTENT[:-1] + b"x"
    assert (fetch("toy", tmp_path / "cache") / "a.data").read_bytes() == CONTENT
    world.carried = CONTENT[:-1] + b"y"
    with pytest.raises(InputError, match="arrived with another sha256"):
        fetch("toy", tmp_path / "other")
    assert list((tmp_path / "other").rglob("*.data")) == []


def test_a_damaged_cache_is_fetched_anew(world: World, tmp_path: Path) -> None:
    path = fetch("toy", tmp_path / "cache") / "a.data"
    path.write_bytes(b"x" + CONTENT[1:])
    assert fetch("toy", tmp_path / "cache") == path.parent
    assert path.read_bytes() == CONTENT
    assert len(world.asked) == 2


def test_every_failure_is_named_in_one_line(world: World, tmp_path: Path) -> None:
    world.online, world.carried = False, None
    with pytest.raises(InputError) as caught:
        fetch("toy", tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("toy.example: no route", "toy-data==1.0: ERROR: no such version", "data.path"):
        assert part in message


def test_an_unknown_name_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known: ml-100k, ml-1m"):
        fetch("ml-7k", tmp_path)


def test_a_cache_that_cannot_be_written_is_an_input_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"set runtime\.cache_dir"):
        fetch("toy", tmp_path / "file")


@pytest.mark.parametrize("name", [name for name in RESOURCES if name.startswith("pypi:")])
def test_installed_packages_are_used_where_they_lie(name: str, tmp_path: Path) -> None:
    package = RESOURCES[name].package
    assert package is not None
    try:
        importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package.name} is not installed")
    before = set(sys.modules)
    path = fetch(name, tmp_path)
    assert path.exists()
    assert path.is_file() == RESOURCES[name].single
    assert list(tmp_path.iterdir()) == []
    assert package.folder.partition("/")[0] not in set(sys.modules) - before  # never imported
