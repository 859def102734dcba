"""The list of records that ``verify`` found unfit: whoever opens the set leaves them out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.output import replace_file

_NAME = "quarantine.jsonl"


@dataclass(frozen=True)
class Quarantine:
    """``places``: (name of the shard, offset in it) of every record to leave out."""

    path: Path
    places: list[tuple[str, int]]


@dataclass(frozen=True)
class Unfit:
    """A record that must not be trained on, and why."""

    shard: str  # file name
    offset: int  # in the shard
    key: int
    problem: str


def quarantine_path(root: Path) -> Path:
    """Of a packed set's folder, or of a field set's .rec file: ``quarantine.jsonl`` in it, or ``train.quarantine.jsonl`` beside it."""
    return root / _NAME if root.is_dir() else root.with_suffix(f".{_NAME}")


def find_quarantine(root: Path, shards: Sequence[Path]) -> Quarantine | None:
    """Read the quarantine of a set, if it has one.

    The first line says which set it is of (``{"shards": {name: bytes}}``); one line per record follows (``Unfit``). Raises ``DataError``
    when it cannot be read, or is of other shards or names others.
    """
    path = quarantine_path(root)
    if not path.exists():
        return None
    remedy = "delete it, or run `python -m data_pipeline verify` again"
    try:
        first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        theirs, places = first["shards"], [(str(line["shard"]), int(line["offset"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable quarantine list ({error!r}); {remedy}") from error
    mine = _sizes(shards)
    if theirs != mine:
        name = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
        raise DataError(
            f"{path}: is of another set: {name} has {mine.get(name, 'no')} bytes here, {theirs.get(name, 'none')} in the list; {remedy}"
        )
    for number, (shard, _) in enumerate(places, 2):
        if shard not in mine:
            raise DataError(f"{path}: line {number} names {shard!r}, which is no shard of the set; {remedy}")
    return Quarantine(path, places) if places else None


def write_quarantine(root: Path, shards: Sequence[Path], records: Sequence[Unfit]) -> Path:
    """Write the list of a set anew; without any record, remove it. Returns its path."""
    path = quarantine_path(root)
    if records:
        replace_file(path, "\n".join(map(json.dumps, [{"shards": _sizes(shards)}, *map(vars, records)])) + "\n")
    else:
        path.unlink(missing_ok=True)
    return path


def _sizes(shards: Sequence[Path]) -> dict[str, int]:
    return {shard.name: shard.stat().st_size for shard in shards if shard.is_file()}
