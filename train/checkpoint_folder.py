"""The ``checkpoints`` folder of a run: committed or not there at all. Files first, then the manifest, the folder's name, the pointer.

    checkpoints/
      latest                  text: the name of the newest complete checkpoint
      step_00001200/
        rank_00000.pt ...     per rank: its pieces of the backbone's float32 masters and moments, its rows of the head, the loader's
                              cursor, random state, its BatchNorm statistics (train.rank_files)
        backbone.safetensors  the whole backbone in float32 under its released key names, for evaluation and release
        backbone_ema.safetensors  the same of the mean weights; with model.ema_decay alone
        manifest.json         what the run was, and size and SHA-256 of every file above; a folder without it is not a checkpoint

A checkpoint is written as ``step_00001200.partial-TOKEN`` and renamed when every file and the manifest are on disk, so a kill at any moment
leaves the checkpoints before it untouched and never one that only looks whole. Nothing here needs torch or other ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.names import is_plain_name
from data_pipeline.output import replace_file, sync_folder

BACKBONE, BACKBONE_EMA = "backbone.safetensors", "backbone_ema.safetensors"
MANIFEST, POINTER = "manifest.json", "latest"
FORMAT = 4
Manifest = dict[str, Any]
_NAME = re.compile(r"step_\d{8}")
_HASHING_THREADS = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the folder, what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is committed; the new one always does."""

    keep_last: int = 1
    keep_every_steps: int | None = None  # those after as many steps, or a multiple of them, stay for ever
    keep_best: int = 0  # those with the highest score in their manifest

    def doomed(self, scores: dict[int, float | None]) -> list[int]:
        """Steps to delete, oldest first. ``scores``: of every checkpoint up to the new one, step -> score."""
        steps = sorted(scores)
        kept = set(steps[-self.keep_last :])
        if self.keep_every_steps:
            kept |= {step for step in steps if step and step % self.keep_every_steps == 0}
        scored = [step for step in steps if scores[step] is not None]
        kept |= set(sorted(scored, key=lambda step: (scores[step], step))[len(scored) - min(self.keep_best, len(scored)) :])
        return [step for step in steps if step not in kept]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class CheckpointFolder:
    """The checkpoints of one run, as the one process sees them that may change them."""

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self.path, self._say = path, say

    def partial(self, step: int, token: str) -> Path:
        """Where the files of a checkpoint are written to. ``token``: of the writing run, so that no other one's files get in between."""
        return self.path / f"{step_name(step)}.partial-{token}"

    def new_partial(self, step: int, token: str) -> Path:
        """An empty folder for :meth:`commit`."""
        partial = self.partial(step, token)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, partial: Path, manifest: Manifest, retention: Retention) -> Path:
        """Make a checkpoint of a folder whose files are on disk, and delete those beyond ``retention``.

        Args:
            manifest: with ``step`` and ``files``: name -> {bytes, sha256} of every file in the folder.
        """
        final = self.path / step_name(manifest["step"])
        sync_folder(partial)
        replace_file(partial / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1))
        sync_folder(partial)
        if final.exists():  # damaged: a resume passed it over and came here again
            delete(final)
        os.replace(partial, final)
        sync_folder(self.path)
        self._point_to(final.name)
        # Later ones were passed over as damaged; they do not count and are replaced when the run comes to their step.
        scores = {step: self._score(step) for step in self._steps() if step <= manifest["step"]}
        for step in retention.doomed(scores):
            delete(self.path / step_name(step))
        return final

    def newest(self, before: int | None = None) -> Path | None:
        """The newest complete checkpoint, every file compared with its manifest; None if there is none at all.

        ``before``: of those of fewer steps. Later ones are deleted once such a one is found: the run came to nothing there.

        Those passed over are named with the reason, and so is a pointer that does not lead to it; it then does. What a killed run left
        half-written or half-deleted is removed.

        Raises: CheckpointError if there are checkpoints but none is complete, or only a pointer to one.
        """
        for stale in [*self.path.glob("step_*.partial*"), *self.path.glob("step_*.deleted")]:
            shutil.rmtree(stale, ignore_errors=True)
        later = [step for step in self._steps() if before is not None and step >= before]
        names = [step_name(step) for step in self._steps() if step not in later]
        for name in reversed(names):
            problem = problem_of(self.path / name)
            if problem is None:
                self._mend_pointer(name)
                for step in later:
                    delete(self.path / step_name(step))
                return self.path / name
            self._say(f"passing over checkpoint {self.path / name}: {problem}")
        if names:
            raise CheckpointError(
                f"{self.path}: no checkpoint here is complete ({len(names)} passed over, reasons above); "
                "repair one, or start again with another output"
            )
        if before is not None:
            return None
        if (self.path / POINTER).is_symlink() or (self.path / POINTER).exists():
            raise CheckpointError(
                f"{self.path}: {POINTER} says that there was a checkpoint, but there is none; bring the checkpoints back, or remove "
                f"{self.path / POINTER} to start at step 0"
            )
        return None

    def _mend_pointer(self, newest: str) -> None:
        """A kill between a commit and its pointer leaves the old one: no word about that."""
        try:
            name = pointed_name(self.path / POINTER)
            if not (self.path / name).is_dir():
                self._say(f"{self.path / POINTER}: names {name}, which is not there; taking {newest}, the newest complete checkpoint")
        except CheckpointError as error:
            self._say(f"{error}; taking {newest}, the newest complete checkpoint")
        self._point_to(newest)

    def _point_to(self, name: str) -> None:
        replace_file(self.path / POINTER, name + "\n")
        sync_folder(self.path)

    def _score(self, step: int) -> float | None:
        try:
            return read_manifest(self.path / step_name(step)).get("score")
        except CheckpointError:
            return None

    def _steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.path.glob("step_*") if _NAME.fullmatch(path.name))


def pointed_name(pointer: Path) -> str:
    """The name in ``latest``; CheckpointError if it is missing, empty, or leads out of its folder."""
    try:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{pointer}: cannot be read ({error.strerror})") from None
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{pointer}: expected the name of a checkpoint beside it, such as {step_name(1200)}, found {name[:80]!r}")
    return name


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises CheckpointError if it cannot be read or is of another format."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        found, step, files = manifest["format"], manifest["step"], manifest["files"]
        described = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its manifest cannot be read ({error})") from None
    if found != FORMAT:
        raise CheckpointError(f"its format is {found}, this version reads {FORMAT}")
    if checkpoint.name != step_name(step):
        raise CheckpointError(f"its manifest is of step {step}")
    strangers = [name for name in described if not is_plain_name(name)]
    if strangers:
        raise CheckpointError(f"its manifest names {strangers[0]!r}, which is no file in it")
    return manifest


def problem_of(checkpoint: Path) -> str | None:
    """Why a folder is not a complete checkpoint; reads every byte of it."""
    try:
        files = read_manifest(checkpoint)["files"]
    except CheckpointError as error:
        return str(error)
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        problems = threads.map(lambda entry: _file_problem(checkpoint / entry[0], entry[1]), files.items())
        return next((problem for problem in problems if problem), None)


def _file_problem(path: Path, expected: dict[str, Any]) -> str | None:
    if path.is_symlink() or not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == expected["sha256"] else f"the SHA-256 of {path.name} is not the manifest's: its content has changed"


class HashedFile:
    """A binary file that hashes what is written to it; on the disk when its block ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._bytes = path, hashlib.sha256(), 0
        self._fresh = path.with_name(f".{path.name}.new")
        self._file: BinaryIO
        self.error: OSError | None = None  # of a write, which the writer may have made something else of

    def __enter__(self) -> HashedFile:
        self._file = self._fresh.open("wb")
        return self

    def write(self, content: bytes | memoryview) -> int:
        self._hash.update(content)
        self._bytes += memoryview(content).nbytes
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            os.replace(self._fresh, self._path)

    def description(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def delete(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill half-way leaves a folder that no longer has a checkpoint's name."""
    doomed = checkpoint.with_name(checkpoint.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def free_bytes(folder: Path) -> int:
    """Of the file system that ``folder`` is on, for this user; ``folder`` may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
