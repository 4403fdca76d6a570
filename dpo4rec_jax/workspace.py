"""The workspace of a run: where each stage leaves its artifact, and whether it is complete.

A stage's directory carries `manifest.json`: digests of what it read (config sections, upstream
artifacts, input files), of what it left, the code version and the time taken. It is written last
and atomically, so a stage is complete exactly when its manifest exists.

Several processes share one workspace: the main one holds the lock and writes, through `write_*`
and the manifests; the others read what it left behind a barrier.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dpo4rec_jax import __version__
from dpo4rec_jax.config import Config, InputError, dump_config, load_config
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.runtime.progress import MetricsLog, Progress

MANIFEST = "manifest.json"
PARTIAL = "partial.json"
TEMPORARY = ".*.tmp"  # files that are being written
SHARED = ".shared"  # by which the processes of a run see that they look at one directory
BYTES_HASHED_WHOLE = 64 * 2**20
BYTES_SAMPLED = 2**20


@dataclass(frozen=True)
class Stage:
    """What a stage's `run` is given.

    `directory` is where it writes; it is empty unless an interrupted run with the same inputs left
    partial files there to continue from.
    """

    config: Config
    workspace: Workspace
    name: str
    round: int | None
    directory: Path
    log: MetricsLog
    progress: Progress


def warms_up(config: Config) -> bool:
    """Whether the run's own policy comes out of stage warmup rather than from `policy.path`."""
    return config.policy.path == "tiny" or config.warmup.texts is not None


class Workspace:
    """Paths and manifests under one directory."""

    def __init__(self, path: Path):
        self.path = path

    def stage_dir(self, name: str, round: int | None = None) -> Path:
        return self.path / name if round is None else self.path / f"round{round}" / name

    def manifest(self, name: str, round: int | None = None) -> dict[str, Any] | None:
        """The manifest of a complete stage, None where it is not complete."""
        path = self.stage_dir(name, round) / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            assert manifest.keys() >= {"inputs_digest", "outputs_digest", "files", "seconds"}
            return manifest
        except (ValueError, AttributeError, AssertionError):
            raise InputError(f"{path}: damaged; {rerun(name, round)}") from None

    def config(self) -> Config:
        """What the run that lies here was configured as. Raises InputError where there is none."""
        path = self.path / "config.yaml"
        if not path.exists():
            raise InputError(
                f"{self.path}: expected the workspace of a run, got no config.yaml; check --workdir"
            )
        return load_config(path)

    def policy_source(self, config: Config, round: int) -> tuple[str, tuple[Path, ...]]:
        """Where round r's policy lies: a path for `load_policy`, and the adapters to merge."""
        base = str(self.stage_dir("warmup") / "policy") if warms_up(config) else config.policy.path
        if config.align.method == "lora":
            aligned = [self.stage_dir("align", r) / "adapter" for r in range(round)]
            return base, tuple(aligned)
        return (str(self.stage_dir("align", round - 1) / "policy") if round else base), ()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the workspace for this run; the system frees it when the main process ends.

        Raises InputError where another run holds it, or a process of this one does not see it.
        """
        with self._held() if this().main else contextlib.nullcontext():
            self._check_shared()
            yield

    def _check_shared(self) -> None:
        if this().count == 1:
            return
        path = self.path / SHARED
        token = this().from_main(lambda: f"{os.uname().nodename} {os.getpid()} {time.time()}")
        write_text(path, token)
        this().barrier("workspace")
        if not (path.exists() and path.read_text(encoding="utf-8") == token):
            raise InputError(
                f"{self.path}: process {this().index} does not see the workspace of process 0; "
                "give a --workdir on a file system that all processes share"
            )
        this().barrier("shared workspace")

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise InputError(
                    f"{self.path}: workspace in use by {holder}; wait for it or name another "
                    "--workdir"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    def adopt(self, config: Config, *, overwrite: bool) -> bool:
        """Writes config.yaml; True where the workspace already held this config.

        Section `runtime` may change: where a run goes on does not change what it is. Raises
        InputError where the workspace holds another config and `overwrite` is not given.
        """
        path = self.path / "config.yaml"
        text = dump_config(config)
        if path.exists():
            held = path.read_text(encoding="utf-8")
            if _without_runtime(held) == _without_runtime(text):
                write_text(path, text)
                return True
            if text.startswith(held):  # a copy of this one that was cut short
                write_text(path, text)
                return True
            if not overwrite:
                key = _first_difference(held, text)
                raise InputError(
                    f"{self.path}: holds a run of another config (first difference: {key}); give "
                    "--overwrite to rerun the stages that change, or another --workdir"
                )
        write_text(path, text)
        return False

    def damaged(self, name: str, round: int | None) -> Path | None:
        """The first file of a complete stage that is not as its manifest says, or None."""
        manifest = self.manifest(name, round)
        for relative, kept in (manifest or {}).get("files", {}).items():
            path = Path(os.path.normpath(self.stage_dir(name, round) / relative))
            if not path.exists() or path.stat().st_size != kept["bytes"]:
                return path
            small = kept["bytes"] <= BYTES_HASHED_WHOLE
            if small and digest_of_file(path) != kept["digest"]:
                return path
        return None

    @contextlib.contextmanager
    def running(
        self,
        name: str,
        round: int | None,
        inputs: Mapping[str, Any],
        *,
        keep_partial: bool,
        outside: Sequence[str] = (),
    ) -> Iterator[Path]:
        """The stage's directory to write in; on a clean exit its manifest is written, last.

        `outside` names files that the stage leaves at the top of the workspace.
        """
        directory = self.stage_dir(name, round)
        if not this().main:
            this().barrier(f"start of {name}")
            yield directory
            this().barrier(f"end of {name}")
            return
        digest = digest_of(inputs)
        if not (keep_partial and _partial_digest(directory) == digest):
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        for temporary in (*directory.rglob(TEMPORARY), *self.path.glob(TEMPORARY)):
            temporary.unlink()  # of a run that was killed while it wrote
        write_json(directory / PARTIAL, {"inputs": digest})
        began = time.monotonic()
        this().barrier(f"start of {name}")
        yield directory
        this().barrier(f"end of {name}")
        (directory / PARTIAL).unlink()
        left = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        files = {
            os.path.relpath(path, directory): {
                "bytes": path.stat().st_size,
                "digest": digest_of_file(path),
            }
            for path in (*left, *(self.path / file for file in outside))
        }
        manifest = {
            "stage": name,
            "round": round,
            "inputs": dict(inputs),
            "inputs_digest": digest,
            "outputs_digest": digest_of(files),
            "code": __version__,
            "seconds": round_seconds(time.monotonic() - began),
            "finished": time.time(),
            "files": files,
        }
        write_json(directory / MANIFEST, manifest)


def step_name(stage: str, round: int | None) -> str:
    """What `--stages` calls one stage of one round: its directory."""
    return stage if round is None else f"round{round}/{stage}"


def rerun(stage: str, round: int | None) -> str:
    """How a message asks for a stage again."""
    return f"rerun its stage: --stages {step_name(stage, round)} --overwrite"


def round_seconds(seconds: float) -> float:
    return round(seconds, 3)


def digest_of(value: Any) -> str:
    """sha256 of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 of a file; of its size, first and last MiB where it is over 64 MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= BYTES_HASHED_WHOLE:
            digest.update(file.read())
        else:
            digest.update(str(size).encode())
            digest.update(file.read(BYTES_SAMPLED))
            file.seek(-BYTES_SAMPLED, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def digest_of_path(path: Path) -> str | None:
    """Digest of a file, or of all files below a directory; None where nothing is there."""
    if path.is_file():
        return digest_of_file(path)
    if not path.is_dir():
        return None
    files = sorted(inner for inner in path.rglob("*") if inner.is_file())
    return digest_of({str(inner.relative_to(path)): digest_of_file(inner) for inner in files})


def parse_json(text: str) -> Any:
    """`json.loads` whose every complaint is a ValueError: of nesting too deep, and of half a
    surrogate pair, which no file of ours can hold, as well."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a surrogate pair") from None
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Of several processes the main one writes, here and below:
    in the others these return at once."""
    if not this().main:
        return
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def iterate_lines(path: Path) -> Iterator[str]:
    """Lines of a JSONL file, which end at newlines alone: texts may hold what Unicode calls line
    separators, and `splitlines` would cut there."""
    with path.open(encoding="utf-8") as file:
        yield from file


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    if not this().main:
        return
    with _replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], *, own: bool = False) -> None:
    """Uncompressed npz without pickles: string arrays must have a fixed-width dtype. `own`: a file
    of this process, whichever it is."""
    for name, array in arrays.items():
        assert array.dtype != object, f"{name}: object arrays would be pickled"
    if not (own or this().main):
        return
    with _replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Arrays by name. Of metadata, one entry at the most: safetensors writes several in an order of
    chance, and equal arrays in other bytes."""
    if not this().main:
        return
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with _replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                code = int(number[1])
                raise OSError(code, os.strerror(code), str(path)) from None
            raise


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _partial_digest(directory: Path) -> str | None:
    try:
        return json.loads((directory / PARTIAL).read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _without_runtime(text: str) -> dict[str, Any] | str:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not isinstance(values, dict):
        return text
    return {name: value for name, value in values.items() if name != "runtime"}


def _first_difference(held: str, wanted: str) -> str:
    """The config path of the first line in which two resolved configs differ."""
    section: list[str] = []
    for ours, theirs in zip(wanted.splitlines(), held.splitlines(), strict=False):
        depth = (len(ours) - len(ours.lstrip())) // 2
        section = [*section[:depth], ours.strip().split(":")[0]]
        if ours != theirs:
            break
    return ".".join(section)
