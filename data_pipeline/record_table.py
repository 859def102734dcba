"""The table of a set's image records: where each lies, how long it is, whose it is. Memory-mapped, so a node's processes share it."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError

MAX_CLASSES = 1 << 24  # labels travel as float32 in the records, which is exact up to here

# 24 bytes a record, 1.02 GB for the 42,474,557 of WebFace42M.
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the record's first byte, from the start of the shards' concatenation
        ("length", "<u4"),  # bytes of the record in the file, framing and padding included
        ("key", "<u4"),  # its number in the index
        ("label", "<u4"),
        ("crc32", "<u4"),  # of the encoded image alone; 0 in a field set, which has none
    ]
)


def are_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Which labels ([n] float32, as records hold them) are whole numbers in [0, num_classes): [n] bool. NaN is none."""
    return (labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))


def write_table_header(file: BinaryIO, num_records: int) -> None:
    """What stands in front of a table's rows. It is as long whatever the number, so that it can be written again when that is known."""
    header = {"descr": np.lib.format.dtype_to_descr(RECORD), "fortran_order": False, "shape": (num_records,)}
    np.lib.format.write_array_header_1_0(file, header)


def read_table(path: Path, num_records: int) -> np.ndarray:
    """Map a table of ``num_records`` records, read-only. Raises ``DataError`` when the file is no such table."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # indexing a memmap takes several times as long
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable table of records ({error}); pack the set again") from error
    if table.dtype != RECORD or table.shape != (num_records,):
        raise DataError(
            f"{path}: {table.shape} of {table.dtype}, expected ({num_records},) of {RECORD}; it belongs to another set: pack the set again"
        )
    return table


class AllBut:
    """Numbers the records that are not ``excluded`` ([E] sorted): the i-th of them has the number ``self[i]``. 8 E bytes of memory."""

    def __init__(self, excluded: np.ndarray) -> None:
        self._kept_before = excluded - np.arange(len(excluded))  # records kept before each excluded one

    def __getitem__(self, i: np.ndarray | int) -> np.ndarray:
        return i + self._kept_before.searchsorted(i, "right")
