"""The 1:1 protocol of IJB: pairs of templates, millions of them, read in seconds."""

import codecs
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.errors import EvalError
from eval.ijb_meta import MAX_DIGITS, IjbTemplates, meta_file, number

CHUNK_BYTES = 1 << 23
FORM = "template template label"


@dataclass(frozen=True)
class TemplatePairs:
    """P pairs of templates, sorted by ``first`` and then ``second``: no number depends on their order."""

    first: np.ndarray  # [P] int32, positions in ``IjbTemplates.ids``
    second: np.ndarray  # [P] int32, greater than ``first``
    same: np.ndarray  # [P] bool, True for pairs of one person
    repeated: int = 0  # pairs that are here again; each counts each time, as in the field


def read_pairs(root: Path, target: str, templates: IjbTemplates, progress: Callable[[int, int], None] | None = None) -> TemplatePairs:
    """Read ``template_pair_label.txt``: lines ``template template label``, label 1 for one person and 0 for two.

    Args:
        progress: called as (bytes done, bytes in all).
    Raises: EvalError that names file and line for a missing file, a line of another form, a template without images or paired with
        itself, a pair with both labels, or a file without one of the labels.
    """
    path = meta_file(root, target, "template_pair_label.txt")
    size, line, keys, rest = path.stat().st_size, 1, [], b""
    with path.open("rb") as file:
        done = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(done)
        while chunk := file.read(CHUNK_BYTES):
            done += len(chunk)
            text, rest = _whole_lines(rest + chunk, last=done >= size)
            if text:
                keys.append(_keys(path, line, text, templates))
                line += len(keys[-1])
            if progress:
                progress(done, size)
    if not keys:
        raise EvalError(f"{path}: the file is empty; expected lines {FORM}")
    return _sorted_pairs(path, keys, len(templates.ids))


def _sorted_pairs(path: Path, keys: list[np.ndarray], num_templates: int) -> TemplatePairs:
    """``keys`` of the lines, see ``_keys``, in parts that follow each other."""
    ordered = np.concatenate(keys)
    ordered.sort()
    same = (ordered & 1).astype(bool)
    ordered >>= 1
    again = ordered[1:] == ordered[:-1]
    contradicts = again & (same[1:] != same[:-1])
    if contradicts.any():
        pair = ordered[int(np.argmax(contradicts))]
        lines = np.flatnonzero(np.concatenate(keys) >> 1 == pair) + 1
        raise EvalError(f"{path}, line {lines[1]}: the two templates of line {lines[0]}; expected no pair with both labels, found one")
    if same.all() or not same.any():
        raise EvalError(f"{path}: all {len(same)} pairs have label {int(same[0])}; expected pairs of one person and of two")
    first = ordered // num_templates
    ordered -= first * num_templates
    return TemplatePairs(first.astype(np.int32), ordered.astype(np.int32), same, int(np.count_nonzero(again)))


def _whole_lines(text: bytes, last: bool) -> tuple[bytes, bytes]:
    """Lines that are complete, each with a line feed at its end and nothing before it, and the begun line after them."""
    if last:
        text = text.rstrip() + b"\n" if text.strip() else b""
    end = text.rfind(b"\n") + 1
    return text[:end].replace(b"\r\n", b"\n"), text[end:]


def _keys(path: Path, line: int, text: bytes, templates: IjbTemplates) -> np.ndarray:
    """[lines] int64 that hold a pair each: ((lower position * T + higher position) * 2 + label)."""
    values = _three_columns(text)
    if values is None:
        values = _three_columns_by_line(path, line, text)
    ids, label = values[:, :2], values[:, 2]
    positions = np.sort(templates.find(ids), axis=1)
    for bad, expected in (
        ((label != 0) & (label != 1), "label 1 (one person) or 0 (two)"),
        (positions[:, 0] < 0, "templates that have images in the file face_tid_mid.txt"),
        (positions[:, 0] == positions[:, 1], "two templates, not one paired with itself"),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            raise EvalError(f"{path}, line {line + at}: expected {expected}, found {' '.join(map(str, values[at]))!r}")
    return (positions[:, 0] * len(templates.ids) + positions[:, 1]) * 2 + label


def _three_columns(text: bytes) -> np.ndarray | None:
    """Values [lines, 3] int64 of lines that all are three numbers with one space or tab between; None for any other text."""
    data = np.frombuffer(text, np.uint8)
    digits = data - np.uint8(ord("0"))  # above 9 for what is no digit: uint8 wraps around
    ends = np.flatnonzero(digits > 9)
    if len(ends) % 3:
        return None
    parted = data[ends].reshape(-1, 3)
    lengths = np.diff(ends, prepend=-1) - 1
    between = (parted[:, :2] == ord(" ")) | (parted[:, :2] == ord("\t"))
    if not between.all() or (parted[:, 2] != ord("\n")).any() or lengths.min() < 1 or lengths.max() > MAX_DIGITS:
        return None
    values = digits[ends - 1].astype(np.int64)
    for place in range(1, int(lengths.max())):
        longer = np.flatnonzero(lengths > place)
        values[longer] += digits[ends[longer] - 1 - place] * np.int64(10**place)
    return values.reshape(-1, 3)


def _three_columns_by_line(path: Path, first_line: int, text: bytes) -> np.ndarray:
    values = []
    for line, found in enumerate(text.decode("utf-8", "replace").removesuffix("\n").split("\n"), start=first_line):
        fields = found.split()
        if len(fields) != 3:
            raise EvalError(f"{path}, line {line}: expected {FORM} (3 fields), found {len(fields)}: {found.strip()[:80]!r}")
        values.append(
            [number(path, line, field, what) for field, what in zip(fields, ("a template", "a template", "a label"), strict=True)]
        )
    return np.array(values, dtype=np.int64)
