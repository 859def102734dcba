"""Writes one shard of a set: reads its images, looks at them, stores them. The job of a worker of ``pack``."""

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipeline import SIDE
from data_pipeline.duplicates import DROPPED_NAME
from data_pipeline.errors import DataError
from data_pipeline.jpeg import NO_SIZE, jpeg_problem, jpeg_size
from data_pipeline.order import EpochOrder
from data_pipeline.output import replace_file, sync_folder
from data_pipeline.record_table import RECORD
from data_pipeline.recordio import RecordWriter, encode_payload
from data_pipeline.shard_set import ShardInfo
from data_pipeline.sources import Source
from data_pipeline.workers import Count

_BLOCK = 2048  # images whose places are computed, and that are counted, at a time


@dataclass(frozen=True)
class Policy:
    """What to do with images that should not be packed as they are."""

    wrong_size: Literal["error", "drop", "resize"] = "error"  # not 112 x 112; resize: and encode anew
    unreadable: Literal["error", "drop"] = "error"
    # Equal bytes. drop: all but one of an identity, and all where identities contradict each other; the source is read twice.
    duplicates: Literal["report", "drop"] = "report"


@dataclass(frozen=True)
class ShardWriter:
    """Called with a shard's number, leaves on the disk:

    - in ``folder / "set"`` the shard, ``shard_00000.rec``;
    - in ``folder`` its part of the table of records, ``shard_00000.table`` (``RECORD``, offsets from the start of the shard); its
      findings, ``shard_00000.jsonl``; and, once all of that is there, ``shard_00000.json``.

    A shard that is there, made in the same way of images that have not changed since, is left as it is.
    """

    source: Source
    folder: Path
    shards: int
    seed: int
    policy: Policy
    dropped: str = ""  # digest of ``DROPPED_NAME`` in ``folder``, [N] bool: which images to leave out; "": there is none

    def bounds(self, number: int) -> tuple[int, int]:
        """The positions in the shuffled order that the shard holds."""
        share, more = divmod(len(self.source), self.shards)
        return tuple(i * share + min(i, more) for i in (number, number + 1))

    def __call__(self, number: int, count: Count) -> None:
        """Raises ``DataError``: an image that ``policy`` does not allow, or a disk that does not take the shard."""
        if self._is_finished(number):
            start, stop = self.bounds(number)
            count(stop - start)
            return
        base = self.folder / shard_name(number)
        try:
            with RecordWriter(base.with_suffix(".part")) as writer:
                state = self._write(number, writer, count)
            base.with_suffix(".part").replace(self.folder / "set" / f"{base.name}.rec")
            sync_folder(self.folder / "set")
            replace_file(base.with_suffix(".json"), json.dumps(state))
        except OSError as error:  # of writing: what cannot be read is a DataError
            raise DataError(f"{error.filename or base.with_suffix('.part')}: {error.strerror or error}") from error

    def _is_finished(self, number: int) -> bool:
        state = shard_state(self.folder, number)
        if state is None or state["dropped"] != self.dropped or state["policy"] not in (None, asdict(self.policy)):
            return False
        return state["changed"] == max(self.source.changed(numbers) for _, _, numbers in self._blocks(number))

    def _write(self, number: int, writer: RecordWriter, count: Count) -> dict:
        base = self.folder / shard_name(number)
        changed = 0
        with open(base.with_suffix(".table"), "wb") as table, open(base.with_suffix(".jsonl"), "w", encoding="ascii") as findings:
            for done, keys, numbers in self._blocks(number):
                columns = (keys.tolist(), numbers.tolist(), self.source.labels(numbers).tolist(), self.source.read(numbers))
                rows = []
                for key, image_number, label, (data, when) in zip(*columns, strict=True):
                    changed = max(changed, when)
                    image, finding = self._judged(image_number, data)
                    if finding is not None:
                        findings.write(json.dumps(finding) + "\n")
                    if image is not None:
                        offset = writer.write_payload(key, encode_payload(float(label), image, id=key))
                        rows.append((offset, writer.position - offset, key, label, zlib.crc32(image)))
                np.array(rows, RECORD).tofile(table)
                count(done)
            info = ShardInfo(f"{base.name}.rec", writer.position, table.tell() // RECORD.itemsize)
            policy = asdict(self.policy) if findings.tell() else None  # None: any other one would have made the same shard
        return {"info": asdict(info), "changed": changed, "dropped": self.dropped, "policy": policy}

    def _blocks(self, number: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The shard's images, some at a time: how many, and of those that are not dropped keys and numbers in the source, [n] int64.

        Keys are the positions in the shuffled order.
        """
        dropped = np.load(self.folder / DROPPED_NAME, mmap_mode="r", allow_pickle=False) if self.dropped else None
        order = EpochOrder(len(self.source), 1, self.seed)
        start, stop = self.bounds(number)
        for low in range(start, stop, _BLOCK):
            keys = np.arange(low, min(low + _BLOCK, stop))
            numbers, count = order.images(0, keys), len(keys)
            if dropped is not None:
                kept = ~dropped[numbers]
                keys, numbers = keys[kept], numbers[kept]
            yield count, keys, numbers

    def _judged(self, number: int, data: bytes | DataError) -> tuple[bytes | None, dict | None]:
        """What to store (None: nothing), and what there is to report (None: nothing)."""
        try:
            if isinstance(data, DataError):
                raise data
            image, size = _stored_form(data, resize=self.policy.wrong_size == "resize")
        except DataError as error:
            where = self.source.where(number)
            problem = str(error).removeprefix(f"{where}: ")
            if self.policy.unreadable == "error":
                raise DataError(f"{where}: {problem}; mend it, take it out, or leave out such images with --unreadable drop") from error
            return None, {"kind": "unreadable, dropped", "image": where, "problem": problem}
        if size == (SIDE, SIDE):
            return image, None
        where, found = self.source.where(number), f"{size[0]}x{size[1]}"
        if self.policy.wrong_size == "error":
            raise DataError(
                f"{where}: an image of {found} pixels, expected {SIDE}x{SIDE}. Align and crop the faces first, or give "
                "--wrong-size drop or resize"
            )
        if self.policy.wrong_size == "drop":
            return None, {"kind": "wrong size, dropped", "image": where, "size": found}
        return image, {"kind": "wrong size, resized", "image": where, "size": found}


def shard_name(number: int) -> str:
    """Without a suffix."""
    return f"shard_{number:05d}"


def shard_state(folder: Path, number: int) -> dict | None:
    """What ``ShardWriter`` says of a finished shard; None: it is not finished."""
    path = folder / f"{shard_name(number)}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _stored_form(data: bytes, *, resize: bool) -> tuple[bytes, tuple[int, int]]:
    """The bytes to store of an image and its (width, height). JPEG is stored as it is, only its markers are looked at.

    ``resize``: to 112 x 112, where it has another size. Raises ``DataError`` when it is no image with 8 bits per channel.
    """
    if data.startswith(b"\xff\xd8"):
        if problem := jpeg_problem(data):
            raise DataError(problem)
        size = jpeg_size(data)
        if size is None:
            raise DataError(NO_SIZE)
        if size == (SIDE, SIDE) or not resize:
            return data, size
    pixels = _decoded(data)
    size = pixels.size
    if resize and size != (SIDE, SIDE):
        pixels = pixels.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=95, subsampling=0, comment=b"")  # else Pillow copies the comment that it read
    return file.getvalue(), size


def _decoded(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] not in "IF":
                return image.convert("RGB")
            mode = image.mode
    except UnidentifiedImageError as error:  # whose text holds an address
        raise DataError("cannot be read as an image: its format is not known") from error
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        raise DataError(f"cannot be read as an image ({error})") from error
    raise DataError(f"holds more than 8 bits per pixel and channel (mode {mode}), expected 8")  # Pillow would clip them to white
