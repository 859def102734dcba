"""Output folders and files that are complete or absent."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import DataError


@contextmanager
def new_folder(target: Path, owned: re.Pattern[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that takes its name when the block ends, and vanishes when the block raises.

    An existing ``target`` is refused without ``force``. With it, the old folder is replaced once the new one is complete, provided that
    every file in it has a name that ``owned`` matches: a mistyped path deletes nothing. A kill leaves a hidden ``.NAME.new-*`` sibling,
    which is safe to delete, and between the two renames of a replacement also the old folder, as ``.NAME.old-*``.
    """
    refuse_existing(target, owned, force)
    target = target.resolve()  # of a symbolic link, what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        fresh.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only the owner reads
        yield fresh
        publish(fresh, target, owned, force=force)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def publish(fresh: Path, target: Path, owned: re.Pattern[str], *, force: bool = False) -> None:
    """Give the complete folder ``fresh`` the name of its sibling ``target``. An existing one is treated as ``new_folder`` says."""
    target = target.resolve()
    sync_folder(fresh)
    if target.exists():
        refuse_existing(target, owned, force)  # it may have appeared meanwhile
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        try:
            os.replace(target, old)
            os.replace(fresh, target)
        finally:
            if not target.exists():  # stopped between the two
                os.replace(old, target)
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(fresh, target)
    sync_folder(target.parent)


def write_file(path: Path, content: str | bytes, *, append: bool = False) -> None:
    """Write (or append to) a file, a text as UTF-8, down to the disk (fsync). Raises OSError, which names the file."""
    try:
        with open(path, "ab" if append else "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = os.fspath(path)  # a write knows it not
        raise


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file that is complete or absent: readers see the old one until the new one is on the disk."""
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        write_file(fresh, content)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """fsync a folder: makes the names in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(target: Path, owned: re.Pattern[str], force: bool) -> None:
    """Raise ``DataError`` when ``new_folder`` would refuse ``target``: ask before slow work."""
    if not target.exists():
        return
    if target.resolve().is_mount():
        raise DataError(f"{target}: is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    if not target.is_dir():
        raise DataError(f"{target}: exists and is no folder; choose another output")
    names = sorted(entry.name for entry in target.iterdir())
    if names and not force:
        raise DataError(f"{target}: exists already; give --force to replace it, or choose another output")
    strangers = [name for name in names if not owned.fullmatch(name)]
    if strangers:
        raise DataError(f"{target}: holds {strangers[0]!r}, which is no part of such an output; --force keeps off. Choose another output")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
